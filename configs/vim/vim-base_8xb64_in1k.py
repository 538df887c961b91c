_base_ = "./vim-small_8xb64_in1k.py"

# The authors published the weights, but no recipe; this is that of Vim-small.
model = dict(backbone=dict(arch="base"), head=dict(in_channels=768))
