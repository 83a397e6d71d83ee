"""Modules in files: saved and loaded again, and loaded from what LyCORIS, PEFT and diffusers wrote."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from crafted import save_peft
from golden import assert_golden, golden_cases
from module_cases import BF16, F16, F32, NEW, random_base, trained, values
from reference import change64, delta64, load, load64
from safetensors import safe_open

from lycoris import LycorisError, RefusedInput, algorithms
from lycoris.algorithms import FactorSpec, FullModule, IA3Module, LoConModule, NormModule, weight_source
from lycoris.buffers import DeviceArray
from lycoris.checkpoint import Checkpoint
from lycoris.dtype import DTYPES
from lycoris.formats import match, read_adapter
from plans.core import ElementKind


@pytest.fixture
def modules(rng):
    made = {f"lycoris_{name.replace(' ', '_')}": trained(NEW[name][0](), rng) for name in NEW}
    base = random_base(rng, (10, 7), BF16)
    dora = LoConModule.new_linear(7, 10, 2, weight_decompose=True, base=base, dtype=F16)
    return made | {
        "lycoris_dora": trained(dora, rng),
        "lycoris_full": trained(FullModule.new((5, 6, 3, 3), bias=True), rng),
        "lycoris_norm": trained(NormModule.new(7, dtype=F32), rng),
        "lycoris_ia3": trained(IA3Module.new((5, 6)), rng),
    }


def test_saved_modules_load_as_they_were(tmp_path, rng, modules):
    path = tmp_path / "adapter.safetensors"
    algorithms.save(path, modules, {"ss_network_module": "lycoris.kohya"})
    assert [file.name for file in tmp_path.iterdir()] == ["adapter.safetensors"]
    loaded = algorithms.load(path, shapes={name: module.shape for name, module in modules.items()})
    assert loaded.keys() == modules.keys()
    for name, module in modules.items():
        base = random_base(rng, module.shape, BF16)
        assert type(loaded[name]) is type(module) and loaded[name].rank == module.rank
        assert loaded[name].merge_into(base, 0.7).numpy().tobytes() == module.merge_into(base, 0.7).numpy().tobytes()
        if module.bias is not None:
            assert loaded[name].bias.numpy().tobytes() == module.bias.numpy().tobytes()


def test_saved_files_have_lycoris_names(tmp_path, modules):
    path = tmp_path / "adapter.safetensors"
    algorithms.save(path, modules, {"ss_network_module": "lycoris.kohya"})
    with safe_open(path, "np") as file:
        names = sorted(f"{name}.{key}" for name, module in modules.items() for key in module.state_dict())
        assert sorted(file.keys()) == names
        assert file.metadata() == {"ss_network_module": "lycoris.kohya"}
        assert file.get_slice("lycoris_dora.lora_up.weight").get_dtype() == "F16"
        assert file.get_slice("lycoris_locon_conv2d.lora_up.weight").get_shape() == [5, 2, 1, 1]
    adapter = read_adapter(path)
    found = {module.stem: module for module in adapter.modules}
    for name, module in modules.items():
        assert found[name].algorithm == module.algorithm and found[name].rank == module.rank
        assert found[name].scale == module.scale()


def test_an_existing_file_is_kept_unless_told(tmp_path, modules):
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(RefusedInput, match="exists; give another name, or overwrite=True"):
        algorithms.save(path, modules)
    assert path.read_bytes() == b"mine"
    algorithms.save(path, modules, overwrite=True)
    assert algorithms.load(path).keys() == modules.keys()
    with pytest.raises(LycorisError, match=r"missing/adapter.safetensors: cannot be written"):
        algorithms.save(tmp_path / "missing" / "adapter.safetensors", modules)


CASES = golden_cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sources_make_the_deltas_of_golden_files(case):
    with Checkpoint.open(case.base) as base:
        tensors = base.tensors
    for path, _ in case.adapters:
        for row in match(read_adapter(path), tensors).matched:
            module, shape = row.module, row.weight.shape
            specs = {
                name: FactorSpec(entry.shape, ElementKind.of(DTYPES[entry.dtype].numpy))
                for name, entry in module.factors.items()
            }
            shape = shape[::-1] if module.transposed else shape
            binding = weight_source(module.algorithm, specs, shape, on_input=module.on_input, name=module.stem)
            extents = (binding.out_features, binding.in_features, math.prod(binding.kernel))
            assert math.prod(extents) == math.prod(shape)
            operands = binding.source.operands("source", *extents)
            factors = [
                load64(module.factors[name]).reshape(operand.shape)
                for name, operand in zip(binding.factor_names, operands, strict=True)
            ]
            found = binding.source.exact(factors, *extents)
            if module.algorithm == "ia3":
                weight = np.ones(shape)
                expected = change64(dataclasses.replace(module, scale=1.0), weight)
            else:
                expected = delta64(module.algorithm, {name: load64(entry) for name, entry in module.factors.items()})
            np.testing.assert_allclose(found.reshape(-1), expected.reshape(-1), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("case", [case for case in CASES if len(case.adapters) == 1], ids=lambda case: case.name)
def test_golden_files_load_and_merge(case):
    """Two modules of each algorithm and number of axes; the merge pipeline's tests merge all of them."""
    expected = case.expected()
    ((path, strength),) = case.adapters
    with Checkpoint.open(case.base) as base:
        rows = match(read_adapter(path), base.tensors).matched

        def sort(row):
            return row.module.algorithm, len(row.weight.shape)

        groups = itertools.groupby(sorted(rows, key=sort), sort)
        picked = [row for _, group in groups for row in itertools.islice(group, 2)]
        shapes = {
            row.module.stem: shape[::-1] if row.module.transposed else shape
            for row in picked
            for shape in [row.weight.shape]
        }
        loaded = algorithms.load(path, shapes=shapes)
        for row in picked:
            weight = load(base.tensors[row.weight.name])
            merged = loaded[row.module.stem].merge_into(DeviceArray.from_numpy(weight), strength)
            assert_golden(merged.numpy(), expected[row.weight.name], weight, weight.dtype)


def test_an_embedding_is_merged_as_the_transpose_of_its_delta(tmp_path, rng):
    """PEFT's own form: base [vocabulary, features], B [features, r], A [r, vocabulary]."""
    up, down = rng.standard_normal((4, 2), np.float32), rng.standard_normal((2, 6), np.float32)
    stem = "base_model.model.embed"
    folder = save_peft(tmp_path, {f"{stem}.lora_embedding_B": up, f"{stem}.lora_embedding_A": down})
    base = random_base(rng, (6, 4), BF16)
    exact = values(base) + 2.0 * (up.astype(np.float64) @ down).T
    assert_golden(algorithms.load(folder)[stem].merge_into(base).numpy(), exact, values(base), BF16.values)
