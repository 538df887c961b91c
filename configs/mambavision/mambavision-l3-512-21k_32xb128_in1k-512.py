_base_ = "./mambavision-l3-256-21k_32xb128_in1k-256.py"

model = dict(backbone=dict(arch="l3-512-21k"))

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="RandomResizedCrop", scale=512, backend="pillow", interpolation="bicubic"),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
# Resized to a square without regard to the aspect ratio.
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(550, 550), backend="pillow", interpolation="bicubic"),
    dict(type="CenterCrop", crop_size=512),
    dict(type="PackInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
