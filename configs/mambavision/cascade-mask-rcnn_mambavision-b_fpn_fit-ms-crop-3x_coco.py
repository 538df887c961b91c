_base_ = "./cascade-mask-rcnn_mambavision-b_fpn_ms-crop-3x_coco.py"

model = dict(backbone=dict(window_size=(32, 16), fit_windows=True, norm_eval=True, drop_path_rate=0.3))
optim_wrapper = dict(optimizer=dict(lr=1e-4), paramwise_cfg=dict(preset="default"))
