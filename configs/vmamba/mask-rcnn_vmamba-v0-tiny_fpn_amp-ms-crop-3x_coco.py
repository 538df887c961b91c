_base_ = "./mask-rcnn_vmamba-v0-tiny_fpn_ms-crop-3x_coco.py"

optim_wrapper = dict(type="AmpOptimWrapper")
