"""The profile of tools/bench: groups of kernels, and where the time of a step goes."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.bench import __main__ as cli  # noqa: E402
from tools.bench import profiling  # noqa: E402


@pytest.mark.slow  # minutes where a processor has no bfloat16
def test_profile_says_where_the_time_goes(capsys):
    assert cli.main(["profile", "resnet18", "--quick", "--device", "cpu", "--top", "3"]) == 0
    said = capsys.readouterr().out
    assert "  convolution\n" in said
    # Its name depends on the processor: those that oneDNN has no bfloat16 for take a slower operator.
    assert re.search(r"aten::\w*conv\w*_backward\n", said)
    assert "no GPU" in said


def test_profile_of_inference(capsys):
    command = ["profile", "zoo_shvit_s4", "--quick", "--device", "cpu", "--top", "1", "--pass", "inference"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "(ours, eager), inference, batch 2:" in said
    assert "backward" not in said
    with pytest.raises(SystemExit):
        cli.main([*command, "--mode", "recipe"])
    assert "'recipe' is not one of inference" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("void cudnn::ops::nchwToNhwcKernel<float>", "change of layout"),
        ("_position_backward_kernel", "ours"),
        ("conv2d_c1_k1_nhwc_kernel_specialized", "depthwise convolution"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16", "convolution"),
        ("nvjet_tst_128x64_NTN", "matrix product"),
        ("triton_poi_fused_add_3", "fused by torch.compile"),
        ("void at::native::vectorized_elementwise_kernel<4>", "pointwise"),
        ("void at::native::batch_norm_collect_statistics", "batch norm"),
        ("something new", "other"),
    ],
)
def test_groups_of_kernels(kernel, group):
    assert profiling.group_of(kernel, frozenset({"_position_backward_kernel"})) == group


def test_our_triton_kernels_are_known_by_name():
    own = profiling.own_kernels()
    # What the ops launch; other functions are part of these.
    launched = {"forward", "backward", "fold", "convolve", "weights_grad", "sum_keys", "answer_queries", "queries_grad"}
    launched |= {"keys_grad", "values_grad", "table_grad", "expand", "apply", "_kernel"}
    assert launched <= own, launched - own
    assert profiling.group_of("backward", own) == profiling.group_of("convolve", own) == "ours"


def test_busy_time_counts_overlaps_once():
    assert profiling.busy_ms([(0, 1000), (500, 2000), (3000, 4000), (3100, 3200)]) == pytest.approx(3.0)
