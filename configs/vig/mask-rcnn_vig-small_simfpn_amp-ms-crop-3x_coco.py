_base_ = "./mask-rcnn_vig-small_simfpn_ms-crop-3x_coco.py"

optim_wrapper = dict(type="AmpOptimWrapper")
