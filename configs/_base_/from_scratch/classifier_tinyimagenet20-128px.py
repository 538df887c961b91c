# The 64-pixel images enlarged twice, so that the last of four stages sees 4 x 4 cells instead of 2 x 2.
_base_ = "./classifier_tinyimagenet20.py"

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=128),
    dict(type="RandomCrop", crop_size=128, padding=16),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
test_pipeline = [dict(type="LoadImageFromFile"), dict(type="Resize", scale=128), dict(type="PackInputs")]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
