"""Child registries of MMEngine's, scope ``mmvssm``.

Configs write ``type='mmvssm.VMamba'``. MMEngine then imports this module by itself, whatever the default scope is, and
on first use the package named in ``locations``; no ``custom_imports`` are needed.
"""

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import Registry

MODELS = Registry("model", parent=MMENGINE_MODELS, scope="mmvssm", locations=["mmvssm.models"])
DATASETS = Registry("dataset", parent=MMENGINE_DATASETS, scope="mmvssm", locations=["mmvssm.datasets"])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    "optimizer wrapper constructor",
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope="mmvssm",
    locations=["mmvssm.engine"],
)
