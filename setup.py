from setuptools import setup

setup(
    name="mmvssm",
    version="0.1.0",
    packages=["mmvssm", "mmvssm_kernels"],
    package_dir={"mmvssm": "mmvssm", "mmvssm_kernels": "kernels/mmvssm_kernels"},
)
