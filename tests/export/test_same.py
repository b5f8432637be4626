"""The padding "same" padding as one operation: timm's numbers, the exporter's, at odd and even sizes."""

import numpy as np
import onnxruntime
import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from zoo.export.same import _Same, translations, with_same_padding


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("size", [(8, 8), (7, 8), (8, 5), (3, 2)])
def test_as_timm_pads(kernel, size):
    torch.manual_seed(0)
    conv = Conv2dSame(4, 6, kernel, stride=2, groups=2)
    x = torch.randn(2, 4, *size)
    found = with_same_padding(nn.Sequential(conv))(x)
    # The same convolution of the same padded image: not a bit may differ.
    assert torch.equal(found, conv(x))
    fake = torch.ops.zoo.conv2d_same(x.to("meta"), conv.weight.to("meta"), None, [2, 2], 2)
    assert fake.shape == found.shape


def test_a_graph_of_free_sizes(tmp_path):
    torch.manual_seed(0)
    layers = [Conv2dSame(3, 8, 3, stride=2), nn.ReLU(), Conv2dSame(8, 8, 5, stride=2, groups=8, bias=False)]
    network = nn.Sequential(*layers, nn.Conv2d(8, 2, 1)).eval()
    changed = with_same_padding(network)
    assert isinstance(network[0], Conv2dSame)  # the network itself is as it was
    assert sum(isinstance(module, _Same) for module in changed) == 2
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    path = str(tmp_path / "graph.onnx")
    torch.onnx.export(
        changed,
        (torch.zeros(2, 3, 13, 18),),
        path,
        dynamo=True,
        dynamic_shapes=(free,),
        input_names=["x"],
        opset_version=18,
        custom_translation_table=translations(),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path)
    for size in ((13, 18), (16, 16), (9, 30)):
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            wanted = network(x).numpy()
        # float32 in another order of summation.
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], wanted, atol=1e-5)


def test_what_has_no_such_padding_is_not_copied():
    network = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1))
    assert with_same_padding(network) is network
