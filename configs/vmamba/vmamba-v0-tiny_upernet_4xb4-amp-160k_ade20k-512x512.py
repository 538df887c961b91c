_base_ = "./vmamba-v0-tiny_upernet_4xb4-160k_ade20k-512x512.py"

optim_wrapper = dict(type="AmpOptimWrapper")
