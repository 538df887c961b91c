_base_ = "./cascade-mask-rcnn_vmamba-tiny-0220_fpn_ms-crop-3x_coco.py"

optim_wrapper = dict(type="AmpOptimWrapper")
