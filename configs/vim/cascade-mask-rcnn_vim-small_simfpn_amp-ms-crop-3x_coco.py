_base_ = "./cascade-mask-rcnn_vim-small_simfpn_ms-crop-3x_coco.py"

optim_wrapper = dict(type="AmpOptimWrapper")
