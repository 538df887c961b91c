"""Models in other formats."""

from mmvssm.export.onnx import DYNAMIC, export_onnx, onnx_errors

__all__ = ["DYNAMIC", "export_onnx", "onnx_errors"]
