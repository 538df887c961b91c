_base_ = "./cascade-mask-rcnn_vmamba-tiny-s1l8_fpn_ms-crop-3x_coco.py"

optim_wrapper = dict(type="AmpOptimWrapper")
