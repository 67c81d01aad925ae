"""The basis as mathematics and as a file: orthogonal, ordered, exact, refused where it is not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loki import Basis, LokiConfig, Variance, calibrate
from loki.basis import Provenance, principal_components
from loki.calibration import KeyStatistics
from loki.config import dimensions, tokens_read
from loki.turn import Turn
from lokimodels import build, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model_hooks import FingerprintMismatch, RequestError

D = 16


def statistics(keys: torch.Tensor, layer: int = 0) -> KeyStatistics:
    """Of keys [B, Hkv, T, D] of one layer."""
    found = KeyStatistics([layer], keys.shape[1], keys.shape[3])
    mask = torch.ones(keys.shape[0], keys.shape[2], dtype=torch.bool)
    found.see(layer, keys, mask)
    return found


def planted(rank: int, rows: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [1, 1, rows, D] that vary in `rank` directions, and these, [D, rank]."""
    generator = torch.Generator().manual_seed(rank)
    directions = torch.linalg.qr(torch.randn(D, rank, generator=generator, dtype=torch.float64)).Q
    keys = torch.randn(rows, rank, generator=generator, dtype=torch.float64) @ directions.T + 3.0
    return keys[None, None], directions


def test_a_planted_subspace_is_recovered() -> None:
    keys, directions = planted(8)
    basis = statistics(keys).fit()
    cosines = torch.linalg.svdvals(basis.components[0, 0, :, :8].double().T @ directions)
    assert torch.sin(torch.acos(cosines.clamp(-1, 1))).max() < 1e-3
    assert basis.rank(1 - 1e-6).tolist() == [[8]]
    assert torch.allclose(basis.mean, torch.full((1, 1, D), 3.0), atol=0.2)


@given(st.integers(0, 1000), st.integers(1, 4))
def test_components_are_orthogonal_and_eigenvalues_ordered(seed: int, scale: int) -> None:
    keys = torch.randn(2, 3, 40, D, generator=torch.Generator().manual_seed(seed)) * scale
    basis = statistics(keys).fit()
    error = basis.components @ basis.components.transpose(-1, -2) - torch.eye(D)
    assert error.abs().max() < 1e-5
    assert (basis.eigenvalues >= 0).all()
    assert (basis.eigenvalues.diff(dim=-1) <= 0).all()
    total = keys.transpose(0, 1).flatten(1, 2).var(1).sum(-1)
    assert torch.allclose(basis.eigenvalues.sum(-1)[0], total, rtol=1e-4)


@given(st.integers(0, 1000), st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_streamed_statistics_equal_those_of_one_shot(seed: int, cuts: list[int]) -> None:
    keys = torch.randn(1, 2, 130, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 5
    parts = keys.split([*cuts, 130 - sum(cuts)], dim=2)
    streamed = statistics(parts[0])
    for part in parts[1:]:
        streamed = streamed + statistics(part)
    rows = keys[0] - keys[0].mean(1, keepdim=True)
    naive = rows.transpose(1, 2) @ rows / 129
    assert (streamed.covariance()[1][0] - naive).abs().max() < 1e-8
    assert (streamed.covariance()[0][0] - keys[0].mean(1)).abs().max() < 1e-8


def test_statistics_of_other_layers_do_not_add() -> None:
    with pytest.raises(RequestError, match="cannot be added"):
        statistics(torch.randn(1, 1, 20, D)) + statistics(torch.randn(1, 1, 20, D), layer=1)


def test_turning_keeps_scores_and_turns_back() -> None:
    basis = calibrate(build(), tokens(8, 32))
    turn = Turn.of(basis, 1)
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 9, 8)
    exact = q.unflatten(1, (2, 2)) @ k[:, :, None].transpose(-1, -2)
    turned = turn.queries(q).unflatten(1, (2, 2)) @ turn.keys(k)[:, :, None].transpose(-1, -2)
    assert torch.allclose(turned, exact, atol=1e-5)
    assert torch.allclose(turn.back(turn.keys(k)), k, atol=1e-5)


def test_long_keys_are_turned_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = Turn.of(calibrate(build(), tokens(8, 32)), 0)
    k = torch.randn(1, 2, 50, 8)
    whole = turn.keys(k)
    monkeypatch.setattr("loki.turn.CHUNK", 7)
    assert torch.allclose(turn.keys(k), whole, atol=1e-6)


def test_a_projection_leaves_out_the_rest_of_the_spectrum() -> None:
    keys = torch.randn(1, 1, 3000, D, generator=torch.Generator().manual_seed(3)) * torch.linspace(1, 0.5, D)
    basis = statistics(keys).fit()
    for d in (2, 4, 8):
        left = keys - keys @ basis.truncated(0, d)
        assert float(left.var(2).sum()) == pytest.approx(float(basis.eigenvalues[0, 0, d:].sum()), rel=1e-4)


def test_rank_counts_the_direction_that_crosses() -> None:
    values = torch.tensor([[[4.0, 3.0, 2.0, 1.0]]])
    basis = Basis(torch.eye(4)[None, None], values, torch.zeros(1, 1, 4), (0,))
    ranks = [int(basis.rank(v)) for v in (0.1, 0.4, 0.41, 0.7, 0.9, 0.91, 1.0)]
    assert ranks == [1, 1, 2, 2, 3, 4, 4]
    for wrong in (0.0, 1.5, True):
        with pytest.raises(RequestError, match="variance"):
            basis.rank(wrong)
    with pytest.raises(RequestError, match="layer 3"):
        basis.row(3)


def test_a_saved_basis_comes_back(tmp_path) -> None:  # type: ignore[no-untyped-def]
    basis = calibrate(build(), tokens(8, 32), name="tiny", text="random", rotary="pre")
    basis.save(tmp_path / "b.safetensors")
    again = Basis.load(tmp_path / "b.safetensors")
    assert again.about == basis.about
    assert again.layers == basis.layers
    assert again.about.tokens == 256
    for name in ("components", "eigenvalues", "mean"):
        assert torch.equal(getattr(again, name), getattr(basis, name))
    again.check(build())


@pytest.fixture
def file(tmp_path):  # type: ignore[no-untyped-def]
    path = tmp_path / "b.safetensors"
    calibrate(build(), tokens(8, 32)).save(path)
    return path


def parts(file) -> tuple[dict[str, torch.Tensor], dict[str, str]]:  # type: ignore[no-untyped-def]
    """Tensors and metadata."""
    with safe_open(file, framework="pt") as opened:
        return load_file(file), opened.metadata()


def rewrite(file, name: str, change) -> None:  # type: ignore[no-untyped-def]
    tensors, metadata = parts(file)
    if name in tensors:
        tensors[name] = change(tensors[name]).contiguous()
    else:
        metadata[name] = change(metadata[name])
    save_file(tensors, file, metadata)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("components", lambda t: t * 1.1, "not orthogonal"),
        ("components", lambda t: t[:2], "components have shape"),
        ("components", lambda t: t.clone().fill_(torch.nan), "not finite"),
        ("eigenvalues", lambda t: -t, "eigenvalues must not"),
        ("eigenvalues", lambda t: t.flip(-1), "eigenvalues must not"),
        ("eigenvalues", lambda t: t[..., :4], "eigenvalues have shape"),
        ("mean", lambda t: t[:, :1], "mean have shape"),
        ("format", lambda _: "0", "format"),
        ("layers", lambda _: "nothing", "is not a basis"),
        ("tokens", lambda _: "many", "is not a basis"),
    ],
)
def test_a_file_that_was_changed_is_refused(file, name, change, message) -> None:  # type: ignore[no-untyped-def]
    rewrite(file, name, change)
    with pytest.raises(RequestError, match=message):
        Basis.load(file)


def test_files_from_when_there_were_two_kinds(file) -> None:  # type: ignore[no-untyped-def]
    """Principal components come back; a basis that turned queries by other directions is refused by name."""
    tensors, metadata = parts(file)
    save_file(tensors, file, {**metadata, "kind": "pca"})
    assert torch.equal(Basis.load(file).components, tensors["components"])
    save_file({**tensors, "query_components": tensors["components"] * 2}, file, {**metadata, "kind": "query"})
    with pytest.raises(RequestError, match="holds query_components, which a basis does not have; calibrate again"):
        Basis.load(file)


def test_a_missing_or_cut_file_is_refused(file, tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(FileNotFoundError, match="loki calibrate"):
        Basis.load(tmp_path / "none.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RequestError, match="calibrate again"):
        Basis.load(file)


def test_a_basis_of_another_model_is_refused() -> None:
    basis = calibrate(build(), tokens(8, 32))
    with pytest.raises(RequestError, match=r"\[4, 2, 8\].*\[4, 2, 16\]"):
        basis.check(build("Qwen3"))
    other = build()
    other.config.rope_parameters["rope_theta"] = 1e6
    with pytest.raises(FingerprintMismatch, match="allow_mismatch=True"):
        basis.check(other)
    basis.check(other, allow_mismatch=True)


@given(st.floats(0.01, 1.0), st.integers(1, 500), st.integers(0, 8), st.integers(0, 8), st.integers(0, 20))
def test_a_share_of_tokens_is_never_none_nor_more_than_there_are(
    k: float, visible: int, sink: int, recent: int, least: int
) -> None:
    config = LokiConfig(k=k, sink=sink, recent=recent, min_k=least)
    read = tokens_read(k, visible, config)
    assert 1 <= read <= visible
    assert read >= min(visible, max(k * visible, sink + recent, least) - 1e-9)
    assert read == visible or read < max(k * visible, sink + recent, least) + 1


def test_dimensions_follow_share_count_and_variance() -> None:
    assert [dimensions(d, 128) for d in (0.25, 0.001, 1.0, 1, 128)] == [32, 1, 128, 1, 128]
    with pytest.raises(RequestError, match=r"d=129.*128"):
        dimensions(129, 128)
    for wrong in (0.0, 1.01, float("nan"), True):
        with pytest.raises(RequestError, match="d="):
            Variance(wrong)


def test_principal_components_are_eigenvectors() -> None:
    a = torch.randn(3, D, D, dtype=torch.float64)
    covariance = a @ a.transpose(-1, -2)
    vectors, values = principal_components(covariance)
    assert torch.allclose(covariance @ vectors, vectors * values.unsqueeze(-2), atol=1e-8)


def test_provenance_can_be_renamed() -> None:
    basis = calibrate(build(), tokens(8, 32)).named(text="other")
    assert basis.about.text == "other"
    assert isinstance(basis.about, Provenance)
