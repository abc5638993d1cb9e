"""pytest collects the contracts of the package here."""

from nope_example.contracts import (
    TestLayerScale,
    TestLayerScaleKernel,
    TestLayerScaleLaw,
    TestNeoX,
)

__all__ = ["TestLayerScale", "TestLayerScaleKernel", "TestLayerScaleLaw", "TestNeoX"]
