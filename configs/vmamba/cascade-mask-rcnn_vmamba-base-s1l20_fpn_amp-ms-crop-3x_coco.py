_base_ = "./cascade-mask-rcnn_vmamba-base-s1l20_fpn_ms-crop-3x_coco.py"

optim_wrapper = dict(type="AmpOptimWrapper")
