_base_ = "./cascade-mask-rcnn_vigh-small_fpn_ms-crop-3x_coco.py"

optim_wrapper = dict(type="AmpOptimWrapper")
