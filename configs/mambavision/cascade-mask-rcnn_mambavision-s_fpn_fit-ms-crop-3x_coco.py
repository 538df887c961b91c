_base_ = "./cascade-mask-rcnn_mambavision-s_fpn_ms-crop-3x_coco.py"

model = dict(backbone=dict(window_size=(32, 16), fit_windows=True, norm_eval=True))
optim_wrapper = dict(paramwise_cfg=dict(preset="default"))
