# SPDX-License-Identifier: Apache-2.0
"""Reports of sharpness: means, standard errors, layers, files."""

from __future__ import annotations

import json
import math

import pytest

from ds_blockwise.blocks.roles import Role
from ds_blockwise.measure.role_sums import RoleOf
from ds_blockwise.measure.sharpness_report import Sample, SharpnessReport, build_report, layer_of, read_csv, write_csv

QKV = "model.layers.3.attn.qkv.weight"
NUMELS = {
    RoleOf("wte.weight", Role.EMBEDDING, False): 100,
    RoleOf(QKV, Role.QUERY, False): 16,
    RoleOf(QKV, Role.KEY, False): 8,
    RoleOf(QKV, Role.VALUE, False): 8,
    RoleOf("model.layers.3.attn.qkv.bias", Role.QUERY, True): 4,
    RoleOf("model.layers.11.norm.weight", Role.NORM, False): 4,
    RoleOf("model.norm.weight", Role.NORM, False): 4,
}
# traces of three samples, in the order of NUMELS
TRACES = ([100, 16, 8, 24, 4, 40, 4], [300, 48, 24, 24, 12, 80, 4], [200, 32, 16, 24, 8, 60, 4])


def _report(tokens: tuple[int, ...] = (10, 10, 10), **changes) -> SharpnessReport:
    samples = [
        Sample(count, dict(zip(NUMELS, map(float, traces), strict=True)))
        for count, traces in zip(tokens, TRACES, strict=False)
    ]
    return build_report(samples, NUMELS, **{"estimator": "gauss_newton", "step": 70, "skipped": 2, **changes})


def test_means_and_standard_errors_at_every_level():
    """Queries, keys and a query's bias are one type; the error is that of the sum, not the sum of errors."""
    report = _report()
    assert report.by_type() == {"emb": 2.0, "qk": 2.0, "vo": 3.0, "norm": 8.0}
    (qk,) = (e for e in report.at("type") if e.block_type == "qk")
    # per parameter 1, 3 and 2: standard deviation 1, of three samples
    assert qk.numel == 28
    assert qk.standard_error == pytest.approx(1 / math.sqrt(3), rel=1e-12)
    (vo,) = (e for e in report.at("type") if e.block_type == "vo")
    assert vo.standard_error == 0.0
    roles = {e.role: (e.numel, e.sharpness) for e in report.at("role")}
    assert roles[Role.QUERY] == (20, 2.0)
    assert roles[Role.KEY] == (8, 2.0)
    layers = {(e.block_type, e.layer): e.sharpness for e in report.at("layer")}
    assert layers == {("emb", None): 2.0, ("qk", 3): 2.0, ("vo", 3): 3.0, ("norm", 11): 15.0, ("norm", None): 1.0}
    assert len(report.at("parameter")) == len(NUMELS)


def test_samples_weigh_by_their_tokens():
    report = _report(tokens=(30, 10))
    assert report.by_type()["emb"] == pytest.approx((30 * 1.0 + 10 * 3.0) / 40)
    assert report.tokens == 40
    single = _report(tokens=(30,))
    assert math.isnan(single.at("type")[0].standard_error)


def test_the_layer_is_the_first_number_of_the_name():
    names = {
        "transformer.h.0.attn.c_attn.weight": 0,
        "decoder.layers.12.mlp.experts.5.linear_fc1.weight": 12,
        "lm_head.weight": None,
        "conv1.weight": None,
        "3.weight": 3,
    }
    assert {name: layer_of(name) for name in names} == names


def test_a_csv_comes_back_as_it_was(tmp_path):
    """Every bit of every number: figures and ratios are made from the file."""
    reports = [
        _report(),
        _report(tokens=(7, 9, 11), step=80, estimator="fisher"),
        _report(tokens=(1,), step=None, skipped=0),
    ]
    write_csv(reports, tmp_path / "s.csv")
    found = read_csv(tmp_path / "s.csv")
    assert [str(r) for r in found] == [str(r) for r in reports]
    assert found[:2] == reports[:2]
    # a NaN equals nothing
    assert repr(found[2]) == repr(reports[2])
    assert [path.name for path in tmp_path.iterdir()] == ["s.csv"]


def test_json_is_strict_and_complete():
    found = json.loads(_report(tokens=(5,)).to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["entries"][0]["standard_error"] is None
    assert {e["level"] for e in found["entries"]} == {"type", "role", "layer", "parameter"}
    assert (found["step"], found["samples"], found["skipped"]) == (70, 1, 2)


def test_the_table_says_what_was_measured():
    text = str(_report())
    assert text.startswith("step 70: gauss_newton, 3 samples, 30 tokens, 2 left out (a gradient was not finite)")
    (row,) = (line.split() for line in text.splitlines() if line.startswith("qk"))
    assert row == ["qk", "28", "2.000e+00", "5.77e-01", "4.00"]
    assert f"{QKV} (key)" in _report().table("parameter")
    assert "norm outside" in _report().table("layer")
    with pytest.raises(ValueError, match="level = 'block': allowed: type, role, layer, parameter"):
        _report().table("block")


def test_damaged_files_are_refused_by_line(tmp_path):
    path = tmp_path / "s.csv"
    write_csv([_report()], path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3].replace("gauss_newton", "gauss_newton,"), *lines[4:]]))
    with pytest.raises(ValueError, match=r"s\.csv, line 4: .*delete the line or restore it"):
        read_csv(path)
    path.write_text("\n".join([*lines, lines[1]]))
    with pytest.raises(ValueError, match="emb of step 70 stands in the file twice"):
        read_csv(path)
    path.write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match="is no sharpness CSV"):
        read_csv(path)
