_base_ = "./cascade-mask-rcnn_mambavision-l-21k_fpn_fit-ms-crop-3x_coco.py"

optim_wrapper = dict(type="AmpOptimWrapper")
