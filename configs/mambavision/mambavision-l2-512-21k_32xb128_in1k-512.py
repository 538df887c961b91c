_base_ = "./mambavision-l2_32xb128_in1k.py"

# For evaluation: how the authors fine-tuned after ImageNet-21k is not published, so the schedule is that of "l2" and
# the augmentation plain.
model = dict(backbone=dict(arch="l2-512-21k"))

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
