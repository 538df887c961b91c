_base_ = "./mask-rcnn_vmamba-small-s2l15_fpn_ms-crop-3x_coco.py"

optim_wrapper = dict(type="AmpOptimWrapper")
