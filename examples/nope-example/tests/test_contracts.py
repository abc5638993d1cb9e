"""pytest collects the contracts of the package here."""

from nope_example.contracts import (
    TestClaims,
    TestLayerScale,
    TestLayerScaleKernel,
    TestLayerScaleLaw,
    TestNeoX,
)

__all__ = ["TestClaims", "TestLayerScale", "TestLayerScaleKernel", "TestLayerScaleLaw", "TestNeoX"]
