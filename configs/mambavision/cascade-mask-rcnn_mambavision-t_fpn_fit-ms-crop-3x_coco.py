_base_ = "./cascade-mask-rcnn_mambavision-t_fpn_ms-crop-3x_coco.py"

# Ours: the authors' detector with windows that fit the map, batch statistics of ImageNet, and weight decay that spares
# decays, step biases, norms and biases.
model = dict(backbone=dict(window_size=(32, 16), fit_windows=True, norm_eval=True))
optim_wrapper = dict(paramwise_cfg=dict(preset="default"))
