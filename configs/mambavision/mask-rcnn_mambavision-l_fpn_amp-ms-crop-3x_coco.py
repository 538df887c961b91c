_base_ = "./mask-rcnn_mambavision-l_fpn_ms-crop-3x_coco.py"

optim_wrapper = dict(type="AmpOptimWrapper")
