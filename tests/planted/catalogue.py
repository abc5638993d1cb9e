"""Mistakes that are easy to make here, each with the one that must notice it.

A plant is a change of one text in one module, which must occur there exactly once: a plant that no
longer applies is an error, not a pass.  Its catcher was named before it was planted, and is a test
that knows the answer by another route or the verdict of a claim, never a snapshot of old output.
Where the first that was named noticed nothing it is listed too, beside the one that does: that was
a hole, or an error too small for the sizes that were asked.

A catcher is written as the command that asks it, to be run by `python -m`: a test, all those of a
class or of a file, or a verdict.  Both kinds end with status 1 where they notice something (a
failed test, a verdict opposite to what the best theory expects).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from nope.checks import expect

AREAS = ("theory", "layers", "statistics", "engine")

SIZES = (
    "--d-model 64 --n-heads 4 --n-ctx 16 --std 0.1 --token-std 0.5 "
    "--draws 20000 --error-rate 1e-6 --engine in-process"
)
"""Where verdicts are asked for: s = d std^2 = 0.64, so that neither s nor W_O's gain is 1."""

WIDE = (
    "--d-model 256 --n-heads 4 --n-ctx 2 --std 0.1 --token-std 0.5 "
    "--draws 200000 --error-rate 1e-6 --engine in-process"
)
"""The same where the norm's fluctuation, 6/d, leaves single coordinates a band to be judged in."""


@dataclass(frozen=True)
class Plant:
    """A mistake: `old` becomes `new` in the file `module`, and `catcher` must notice.

    `unnoticed_by` is the catcher that was named first, where that, as it was, did not.
    """

    name: str
    wrong: str
    area: str
    module: str
    old: str
    new: str
    catcher: str
    unnoticed_by: str = ""

    @property
    def digest(self) -> str:
        """That of the change: what was said of another one says nothing of this."""
        change = repr((self.module, self.old, self.new)).encode()
        return hashlib.blake2b(change, digest_size=8).hexdigest()

    def apply(self, root: Path) -> None:
        """Plant it in the sources under `root`; raise `ValueError` where it does not apply."""
        path = root / self.module
        source = path.read_text()
        times = source.count(self.old)
        remedy = f"write the plant '{self.name}' anew"
        expect(times == 1, f"{self.old!r} once in {self.module}", f"it {times} times", remedy)
        planted = source.replace(self.old, self.new)
        compile(planted, str(path), "exec")
        path.write_text(planted)


def _test(name: str) -> str:
    return f"pytest tests/{name}"


def _verdict(claim: str, sizes: str = SIZES) -> str:
    return f"nope verify {claim} {sizes}"


_THEORY = (
    Plant(
        "factor H",
        "the logits' variance is divided by the number of heads, as Lemma 2 is printed",
        "theory",
        "theory/rules/attention.py",
        "expression=K(m, m) * J(n, n),",
        "expression=K(m, m) * J(n, n) * operation.d_head / d,",
        _test(
            "theory/test_rules.py::test_scores_by_enumerating_every_sign_of_both_weight_matrices"
        ),
        unnoticed_by=_verdict("chi2023.lemma2.corrected"),
    ),
    Plant(
        "1/(m+1)",
        "a prefix of m positions is averaged over m + 1",
        "theory",
        "theory/rules/attention.py",
        "expression=PREFIX_SUM / (m * n),",
        "expression=PREFIX_SUM / ((m + 1) * (n + 1)),",
        _verdict("chi2023.covariance"),
    ),
    Plant(
        "ln L for H_L",
        "a harmonic number is taken for its logarithm and Euler's constant",
        "theory",
        "theory/formulas/depth.py",
        "np.asarray(digamma(arrays[0] + 1) + np.euler_gamma)",
        "np.asarray(np.log(arrays[0]) + np.euler_gamma)",
        _test("theory/test_depth.py::test_harmonic_numbers"),
    ),
    Plant(
        "residual scale not squared",
        "the branch's kernel is multiplied by the residual scale instead of its square",
        "theory",
        "theory/rules/residual.py",
        "sp.nsimplify(operation.scale) ** 2 * J(m, n)",
        "sp.nsimplify(operation.scale) * J(m, n)",
        _test("theory/test_propagation.py::test_two_layers_against_real_ones"),
    ),
    Plant(
        "forgotten output projection",
        "the theory leaves the kernel as it is behind W_O",
        "theory",
        "theory/rules/linear.py",
        "expression = width_of(operation.weight) * variance_of(operation.weight) * K(m, n)",
        "gain = width_of(operation.weight) * variance_of(operation.weight)\n"
        '    expression = K(m, n) * (1 if operation.weight.role == "output" else gain)',
        _verdict("chi2023.residual"),
    ),
    Plant(
        "fan_out for fan_in in a map",
        "a map's gain is its number of outputs times the variance: right where it is square",
        "theory",
        "theory/rules/linear.py",
        'return symbols.d_ff if weight.role == "mlp_out" else symbols.d\n\n\ndef height_of',
        'return symbols.d_ff if weight.role == "mlp_in" else symbols.d\n\n\ndef height_of',
        _test("theory/test_rules.py::test_linear_map_by_enumerating_every_sign_matrix"),
    ),
    Plant(
        "bias's deviation for its variance",
        "a bias adds sigma_b to the kernel instead of sigma_b^2",
        "theory",
        "theory/rules/linear.py",
        "expression += symbols.sigma_b**2",
        "expression += symbols.sigma_b",
        _test("theory/test_rules.py::test_linear_map_by_enumerating_every_sign_matrix"),
    ),
    Plant(
        "eps forgotten in the theory",
        "a LayerNorm's eps is taken for 0",
        "theory",
        "theory/rules/norm.py",
        "eps = symbols.eps if operation.eps else ZERO",
        "eps = ZERO",
        _test("theory/test_rules.py::test_layernorm_of_fixed_centred_vectors_by_definition"),
    ),
    Plant(
        "centring forgotten",
        "a LayerNorm leaves all of a variance, and not 1 - 1/d of it",
        "theory",
        "theory/rules/norm.py",
        "kept = 1 - 1 / d if centring else sp.Integer(1)",
        "kept = sp.Integer(1)",
        _test(
            "theory/test_rules.py::test_centring_keeps_one_minus_one_over_d_of_an_isotropic_kernel"
        ),
    ),
    Plant(
        "cosine without the root",
        "a norm divides by K_mm K_nn: right on the diagonal of unit variances",
        "theory",
        "theory/rules/norm.py",
        "rho = K(m, n) / sp.sqrt(K(m, m) * K(n, n))",
        "rho = K(m, n) / (K(m, m) * K(n, n))",
        _test("theory/test_rules.py::test_rmsnorm_of_fixed_vectors_by_definition"),
    ),
    Plant(
        "excess with the wrong sign",
        "what a softmax adds to a cosine beyond the cosine of the mean kernel is subtracted",
        "theory",
        "theory/rules/norm.py",
        "expression * (1 + X(m, n))",
        "expression * (1 - X(m, n))",
        _test(
            "theory/test_propagation.py::"
            "test_a_norm_behind_a_softmax_reads_a_participation_that_varies"
        ),
    ),
    Plant(
        "a cosine of sure norms",
        "the error of a cosine is that of the inner product alone",
        "theory",
        "theory/propagation.py",
        "linear = slopes[0] * left + slopes[1] * right + slopes[2] * product",
        "linear = slopes[2] * product",
        _test(
            "theory/test_propagation.py::test_the_error_of_a_cosine_is_within_what_its_parts_leave"
        ),
    ),
    Plant(
        "copies bent like Gaussians",
        "the cosine of tokens that are one or another has the 1/d term of Gaussian vectors",
        "theory",
        "theory/rules/norm.py",
        "copies = before.repeated is not None and before.mapped is None",
        "copies = False",
        _test("theory/test_repetition.py::test_a_norm_of_tokens_that_repeat_is_exact_at_any_width"),
    ),
    Plant(
        "norms that fluctuate taken for fixed",
        "the 1/d term over Gaussian tokens lacks what a token's norm adds",
        "theory",
        "theory/rules/mixing.py",
        "own = self.longer(rest + mixing.slack / mixing.count)",
        "own = self.longer(rest)",
        _test(
            "theory/test_softmax_rules.py::"
            "test_the_first_order_over_gaussian_tokens_is_that_of_wishart_matrices"
        ),
    ),
    Plant(
        "ReLU without 1/2",
        "the dual of ReLU is that of sqrt(2) ReLU",
        "theory",
        "theory/formulas/duals.py",
        "(height + c * (sp.pi - sp.atan2(height, c))) / (2 * sp.pi)",
        "(height + c * (sp.pi - sp.atan2(height, c))) / sp.pi",
        _test("theory/test_duals.py::test_relu_by_quadrature_in_polar_coordinates"),
    ),
    Plant(
        "exact GELU for tanh's",
        "the dual of GELU's tanh approximation is that of GELU",
        "theory",
        "theory/formulas/duals.py",
        '"gelu_tanh": GeluTanhDual(a, b, c),',
        '"gelu_tanh": gelu(),',
        _test("theory/test_duals.py::test_a_dual_by_two_dimensional_quadrature"),
    ),
    Plant(
        "Wishart without the 2",
        "of the two pairings in the covariance of a Gaussian Gram matrix one is forgotten",
        "theory",
        "theory/fluctuations.py",
        "K[a][c] * J[b][d] + K[a][d] * J[b][c] + J[a][c] * K[b][d] + J[a][d] * K[b][c]",
        "K[a][c] * J[b][d] + J[a][c] * K[b][d]",
        _test("theory/test_fluctuations.py::test_wishart_by_the_three_point_rule"),
    ),
    Plant(
        "fluctuation of a scaled branch",
        "a scaled branch's fluctuation is weighed by the scale instead of its square",
        "theory",
        "theory/rules/residual.py",
        "fluctuates=partial(_adds, operation.scale**2),",
        "fluctuates=partial(_adds, operation.scale),",
        _test("planted/test_catchers.py::test_a_residual_scale_is_a_factor_of_the_last_map"),
        unnoticed_by=_test("theory/test_fluctuations.py::test_uniform_stacks_of_width_16"),
    ),
    Plant(
        "logit's kurtosis at d for d_head",
        "a logit is taken for a sum of d products where a head has d/H of them",
        "theory",
        "theory/formulas/kurtosis.py",
        "(3 * (1 - 1 / d_h) * paired + fourth / d_h)",
        "(3 * (1 - 1 / d) * paired + fourth / d)",
        _test("theory/test_rules.py::test_logit_kurtosis_by_the_three_point_rule"),
    ),
    Plant(
        "crossed pairs counted once",
        "of the crossed pairs in the norm kurtosis of a mean of vectors half are forgotten",
        "theory",
        "theory/formulas/kurtosis.py",
        "(nu + (m - 1) * (1 + 2 / n)) / m",
        "(nu + (m - 1) * (1 + 1 / n)) / m",
        _test("theory/test_kurtosis.py::test_uniform_attention"),
    ),
    Plant(
        "ratio of Gammas not squared",
        "the mean cosine of Gaussian vectors has Gamma((d+1)/2)/Gamma(d/2) to the first power",
        "theory",
        "theory/formulas/cosine.py",
        "rho * 2 / d * ratio**2 * sp.hyper",
        "rho * sp.sqrt(2 / d) * ratio * sp.hyper",
        _test("theory/test_cosine.py::test_width_one_is_the_sign_correlation"),
        unnoticed_by=_verdict("zuo2025.finite_width"),
    ),
    Plant(
        "n/m for sqrt(n/m)",
        "the cosine of prefix means is the ratio of their lengths",
        "theory",
        "theory/formulas/cosine.py",
        "uniform = sp.sqrt(sp.Min(m, n) / sp.Max(m, n))",
        "uniform = sp.Min(m, n) / sp.Max(m, n)",
        _test("theory/test_cosine.py::test_prefix_means_by_simulation"),
        unnoticed_by=_verdict("zuo2025.finite_width"),
    ),
    Plant(
        "transposed value map",
        "Lemma 4 reads rows of M = W_O W_V for its columns",
        "theory",
        "theory/papers/chi2023.py",
        "return product.T",
        "return product",
        _verdict("chi2023.lemma4.corrected", WIDE),
        unnoticed_by=_verdict("chi2023.lemma4.corrected"),
    ),
    Plant(
        "BOS counted as a token",
        "the BOS is taken for one more token of the vocabulary, equal to others by chance",
        "theory",
        "theory/formulas/tokens.py",
        "    same = np.eye(n_ctx)\n"
        "    same[1:, 1:] = collision_matrix(tokens.tokens, n_ctx - 1)\n"
        "    return same",
        "    return collision_matrix(tokens.tokens, n_ctx)",
        _test("theory/test_tokens.py::test_a_bos_equals_nothing_else"),
    ),
    Plant(
        "softmax's remainder forgotten",
        "a softmax taken as uniform says that it drops nothing: leading order passes for exact",
        "theory",
        "theory/rules/attention.py",
        "sources, after(operation, traits), sum(ignored) / 2\n",
        "sources, after(operation, traits), ZERO\n",
        _test("theory/test_predict.py::test_a_softmax_taken_as_uniform_is_leading_order"),
    ),
    Plant(
        "remainder forgotten in a region",
        "a leading-order formula is held to the tolerance of an exact one",
        "theory",
        "theory/relations.py",
        "width = tolerance * scale + remainder",
        "width = tolerance * scale",
        _test("theory/test_claims.py::test_equals_adds_the_remainder"),
    ),
    Plant(
        "derivations of old code",
        "kept derivations are found by their input alone, whatever code made them",
        "theory",
        "theory/cache.py",
        "return None if above is None or code is None else above / code",
        'return None if above is None or code is None else above / "entries"',
        _test("theory/test_cache.py::test_processes_share_entries_until_the_code_changes"),
    ),
    Plant(
        "inner products of keys taken as exact",
        "what is dropped of the keys' correlations is forgotten in a pattern's error",
        "theory",
        "theory/rules/softmax.py",
        "np.asarray(norms + norms.cumsum() / count + moved)",
        "np.asarray(norms + norms.cumsum() / count)",
        _test("theory/test_repetition.py::test_patterns_over_few_words_know_what_they_miss"),
    ),
    Plant(
        "deviation for variance",
        "a random map's Gram matrix fluctuates by one over the root of its width",
        "theory",
        "theory/rules/linear.py",
        "max(1 / weight.fan_out - lost, 0.0)",
        "max(weight.fan_out**-0.5 - lost, 0.0)",
        _test("properties/test_limits.py::test_what_width_adds_falls_as_one_over_d"),
    ),
    Plant(
        "both halves whole",
        "what two queries share counts fully in either half of a sum that is symmetrised",
        "theory",
        "theory/rules/mixing.py",
        "shared *= queries[rows] / 2",
        "shared *= queries[rows]",
        _test("properties/test_limits.py::test_a_fidelity_is_wrong_by_the_order_it_claims"),
    ),
    Plant(
        "prefix sum off by one",
        "a prefix mean sums over i <= m and j < n",
        "theory",
        "theory/propagation.py",
        "    return np.asarray(column_sums(matrix).cumsum(1))",
        "    sums = column_sums(matrix)\n    return np.asarray(sums.cumsum(1) - sums)",
        _test("properties/test_kernels.py::test_a_kernel_is_symmetric_and_positive"),
    ),
    Plant(
        "a bias for each position",
        "a bias adds to the diagonal of a kernel alone, as if positions had their own",
        "theory",
        "theory/rules/linear.py",
        "expression += symbols.sigma_b**2",
        "expression += symbols.sigma_b**2 * sp.KroneckerDelta(m, n)",
        _test("contracts/test_layers.py::TestAttentionWithRandomBiasesKernelContract"),
        unnoticed_by=_test("contracts/test_layers.py::TestAttentionWithBiasesKernelContract"),
    ),
    Plant(
        "left root in the upper tail",
        "P(phi(X) > x) subtracts what lies beyond the left root of GELU, where it adds",
        "theory",
        "theory/laws/transformed.py",
        "self._gaussian.sf(self._phi.risen(x)) + left",
        "self._gaussian.sf(self._phi.risen(x)) - left",
        _test("contracts/test_laws.py::Test_gelu"),
    ),
)

_LAYERS = (
    Plant(
        "sqrt(d) for sqrt(d_head)",
        "logits are divided by the root of the model's width",
        "layers",
        "nope/transformer.py",
        "alpha=1 / math.sqrt(d_head),",
        "alpha=1 / math.sqrt(heads * d_head),",
        _verdict("chi2023.lemma2.corrected"),
    ),
    Plant(
        "mask off by one",
        "a query sees the key after its own",
        "layers",
        "nope/transformer.py",
        ".triu_(1)",
        ".triu_(2)",
        _test("nope/test_transformer_causality.py::test_later_tokens_change_nothing_earlier"),
    ),
    Plant(
        "prefix counted from 2",
        "the running mean of m values divides by m + 1",
        "layers",
        "nope/transformer.py",
        "torch.arange(1, x.shape[-2] + 1,",
        "torch.arange(2, x.shape[-2] + 2,",
        _verdict("chi2023.lemma3"),
    ),
    Plant(
        "unbiased variance in LayerNorm",
        "LayerNorm divides by the standard deviation with d - 1",
        "layers",
        "nope/transformer.py",
        "    return norm(x, (x.shape[-1],), eps=operation.eps)",
        '    if operation.kind == "layernorm":\n'
        "        return (x - x.mean(-1, True)) / (x.var(-1, keepdim=True) + operation.eps).sqrt()\n"
        "    return norm(x, (x.shape[-1],), eps=operation.eps)",
        _test("nope/test_transformer_reference.py::test_norms_are_their_formulas"),
    ),
    Plant(
        "eps forgotten in the layer",
        "LayerNorm is computed with eps 0",
        "layers",
        "nope/transformer.py",
        "return norm(x, (x.shape[-1],), eps=operation.eps)",
        "return norm(x, (x.shape[-1],), eps=0.0)",
        _test("nope/test_transformer_reference.py::test_norms_are_their_formulas"),
    ),
    Plant(
        "output projection left out",
        "the heads' outputs enter the stream without W_O",
        "layers",
        "nope/transformer.py",
        "    y = weights.product(inputs[0], operation)\n",
        "    y = weights.product(inputs[0], operation)\n"
        '    y = inputs[0] if operation.weight.role == "output" else y\n',
        _verdict("chi2023.lemma3"),
    ),
    Plant(
        "transposed weights",
        "square matrices are applied from the other side: the same law, another network",
        "layers",
        "nope/transformer.py",
        "torch.bmm(x, w)",
        "torch.bmm(x, w.transpose(1, 2) if w.shape[1] == w.shape[2] else w)",
        _test(
            "nope/test_transformer_causality.py::test_weights_of_each_draw_are_used_by_that_draw"
        ),
    ),
    Plant(
        "products in bfloat16",
        "what TF32 is on a GPU: factors are rounded to a few digits before they are multiplied",
        "layers",
        "nope/transformer.py",
        "return x @ w[0] if w.shape[0] == 1",
        "return (x.bfloat16() @ w[0].bfloat16()).to(x.dtype) if w.shape[0] == 1",
        _test("nope/test_transformer_reference.py::test_equals_torch_encoder_layer_in_float32"),
    ),
    Plant(
        "dropout left on",
        "a tenth of the attention weights is dropped, the others scaled up",
        "layers",
        "nope/transformer.py",
        "else pattern @ v",
        "else F.dropout(pattern, 0.1) @ v",
        _test("nope/test_transformer_reference.py::test_equals_torch_encoder_layer_in_float64"),
    ),
    Plant(
        "tanh's GELU for the exact one",
        "GELU is computed by its tanh approximation: 3e-4 off at most",
        "layers",
        "nope/transformer.py",
        '"gelu": F.gelu,',
        '"gelu": partial(F.gelu, approximate="tanh"),',
        _test("nope/test_transformer_reference.py::test_equals_torch_encoder_layer_in_float32"),
    ),
    Plant(
        "residual scale forgotten in the layer",
        "the branch is added as it is",
        "layers",
        "nope/transformer.py",
        "return torch.add(*inputs, alpha=operation.scale)",
        "return torch.add(*inputs)",
        _test("theory/test_propagation.py::test_two_layers_against_real_ones"),
    ),
    Plant(
        "heads split by interleaving",
        "head h takes every H-th coordinate, and heads are joined as if they were blocks",
        "layers",
        "nope/transformer.py",
        "        split = y.view(*y.shape[:2], operation.n_heads, -1)\n"
        "        return split.transpose(1, 2)",
        "        split = y.view(*y.shape[:2], -1, operation.n_heads)\n"
        "        return split.permute(0, 3, 1, 2)",
        _test("nope/test_transformer_reference.py::test_equals_torch_encoder_layer_in_float64"),
    ),
    Plant(
        "packed Xavier for plain",
        "queries, keys and values are drawn as if torch packed them where it does not",
        "layers",
        "nope/init.py",
        "stacked = (3 if self.packed else 1) * weight.fan_out",
        "stacked = 3 * weight.fan_out",
        _test("nope/test_init_schemes.py::test_torch_modules_draw_the_stated_laws"),
    ),
    Plant(
        "fan_in and fan_out swapped",
        "Kaiming's and LeCun's rules scale by the number of outputs",
        "layers",
        "nope/init.py",
        '"fan_in": lambda weight: weight.fan_in,\n    "fan_out": lambda weight: weight.fan_out,',
        '"fan_in": lambda weight: weight.fan_out,\n    "fan_out": lambda weight: weight.fan_in,',
        _test("nope/test_init_schemes.py::test_torch_draws_the_stated_moments"),
    ),
    Plant(
        "Kaiming's gain not squared",
        "the variance for a ReLU is sqrt(2)/fan instead of 2/fan",
        "layers",
        "nope/init.py",
        '"relu": 2.0,',
        '"relu": math.sqrt(2.0),',
        _test("nope/test_init_schemes.py::test_gains_are_torchs"),
    ),
    Plant(
        "muP's exponent",
        "the deviation goes as 1/fan_in instead of its root",
        "layers",
        "nope/init.py",
        "self.std * math.sqrt(self.base_width / weight.fan_in)",
        "self.std * self.base_width / weight.fan_in",
        _test("nope/test_init_schemes.py::test_variances_are_the_published_ones"),
    ),
    Plant(
        "truncation's variance not made up for",
        "a truncated normal of a given variance is one that had it before the truncation",
        "layers",
        "nope/init.py",
        "math.sqrt(variance / TruncatedNormal(1.0).variance)",
        "math.sqrt(variance)",
        _test("nope/test_init_schemes.py::test_variances_are_the_published_ones"),
        unnoticed_by=_test("nope/test_init_schemes.py::test_jaxs_constant"),
    ),
    Plant(
        "GPT-2's depth by layers",
        "projections into the stream are divided by sqrt(N) where there are 2N of them",
        "layers",
        "nope/init.py",
        "self.std / math.sqrt(architecture.n_residual or 1)",
        "self.std / math.sqrt((architecture.n_residual + 1) // 2 or 1)",
        _test("nope/test_init_schemes.py::test_gpt2_divides_projections_into_the_stream"),
    ),
    Plant(
        "orthogonal without signs",
        "Q of a QR is returned as the library made it, which is not Haar distributed",
        "layers",
        "nope/sources.py",
        "return Q * signs[..., None, :]",
        "return Q",
        _test("nope/test_streams.py::test_orthogonal_draws_are_haar"),
    ),
    Plant(
        "Zipf's ranks from 2",
        "the most frequent token has the probability of the second",
        "layers",
        "nope/tokens.py",
        "np.arange(1, size + 1, dtype=np.float64) ** -exponent",
        "np.arange(2, size + 2, dtype=np.float64) ** -exponent",
        _test("nope/test_tokens.py::test_zipf_probabilities_are_normalised_exactly"),
    ),
    Plant(
        "queries and keys exchanged",
        "l_mn is <k_m, q_n>: the same law, another network",
        "layers",
        "nope/transformer.py",
        "    q, k = inputs\n    draws, heads, length, d_head = q.shape",
        "    k, q = inputs\n    draws, heads, length, d_head = q.shape",
        _test("contracts/test_layers.py::TestAttentionLayerContract"),
    ),
    Plant(
        "a query blind to its own key",
        "the mask takes the diagonal too, but for the first query, which would see nothing",
        "layers",
        "nope/transformer.py",
        "dtype=q.dtype).triu_(1)\n",
        "dtype=q.dtype).triu_(0)\n        mask[0, 0] = 0.0\n",
        _test("properties/test_layers.py::test_small_logits_attend_uniformly"),
    ),
    Plant(
        "residual behind the norm",
        "a branch is added to what its norm has made of the stream",
        "layers",
        "nope/layers.py",
        "            output = operation.place\n        yield Add(",
        "            output = operation.place\n"
        "            if isinstance(operation, Normalise):\n"
        "                source = operation.place\n"
        "        yield Add(",
        _test("properties/test_layers.py::test_norms_make_branches_free_of_the_streams_scale"),
    ),
    Plant(
        "biases of heads forgotten",
        "queries, keys and values are mapped without the bias that they were asked to have",
        "layers",
        "nope/transformer.py",
        "    if operation.bias is not None:",
        "    if operation.bias is not None and operation.n_heads is None:",
        _test("contracts/test_layers.py::TestAttentionWithRandomBiasesLayerContract"),
        unnoticed_by=_test("contracts/test_layers.py::TestAttentionWithBiasesLayerContract"),
    ),
    Plant(
        "kurtosis of a uniform law",
        "uniform weights state the kurtosis of Gaussian ones, 3 for 9/5",
        "layers",
        "nope/init.py",
        "kurtosis: ClassVar[float] = 9 / 5",
        "kurtosis: ClassVar[float] = 3.0",
        _test("contracts/test_schemes.py"),
    ),
)

_STATISTICS = (
    Plant(
        "biased variance",
        "the variance over draws divides by n",
        "statistics",
        "montecarlo/moments.py",
        "return square / (self.count - 1), skewness",
        "return square / self.count, skewness",
        _test("montecarlo/test_moments.py::test_along_is_variance_and_skewness_of_the_combination"),
    ),
    Plant(
        "Welford's merge",
        "two sets of draws are merged as if both were as large as the second",
        "statistics",
        "montecarlo/moments.py",
        "outer * (a * b / total)",
        "outer * (b * b / total)",
        _test("montecarlo/test_moments.py::test_merging_any_split_gives_the_moments_of_all_draws"),
    ),
    Plant(
        "third moments merged with the wrong sign",
        "the larger set's shift skews the merged moments the other way",
        "statistics",
        "montecarlo/moments.py",
        "(a * b * (a - b) / total**2)",
        "(a * b * (b - a) / total**2)",
        _test("montecarlo/test_moments.py::test_merging_any_split_gives_the_moments_of_all_draws"),
    ),
    Plant(
        "sums in float32",
        "moments are accumulated in the dtype of the draws",
        "statistics",
        "montecarlo/moments.py",
        "x = np.asarray(draws, dtype=np.float64)",
        "x = np.asarray(draws)",
        _test("planted/test_catchers.py::test_float32_draws_have_the_moments_of_the_same_numbers"),
        unnoticed_by=_test(
            "montecarlo/test_moments.py::test_float32_draws_are_accumulated_in_float64"
        ),
    ),
    Plant(
        "standard error without sqrt(n)",
        "the standard deviation of a draw passes for that of the mean",
        "statistics",
        "montecarlo/evidence.py",
        "np.sqrt(self._spread()[0] / self.draws)",
        "np.sqrt(self._spread()[0])",
        _test("montecarlo/test_decide.py::test_standard_errors_of_ratios_are_those_of_repetition"),
    ),
    Plant(
        "pooled standard errors",
        "inputs that share a draw of the weights count as independent draws",
        "statistics",
        "montecarlo/sampler.py",
        "draws = every.reshape(-1, self.inputs, *every.shape[1:]).mean(1)",
        "draws = every",
        _test("planted/test_catchers.py::test_inputs_of_one_draw_are_one_draw"),
        unnoticed_by=_test("montecarlo/test_estimators.py"),
    ),
    Plant(
        "looks not paid for",
        "the interval for one look is used at every look",
        "statistics",
        "montecarlo/confidence.py",
        "return float(np.sqrt(2 * (1 + 1 / spread) * (np.log1p(spread) / 2 + log / 2)))",
        "return float(-special.ndtri(error_rate / 2))",
        _test("montecarlo/test_confidence.py::test_no_look_misses_more_often_than_stated"),
    ),
    Plant(
        "one side for two",
        "each end of the exact interval is given the whole error rate",
        "statistics",
        "montecarlo/confidence.py",
        "_radius(draws, second, room, error_rate / 2)",
        "_radius(draws, second, room, error_rate)",
        _test("montecarlo/test_confidence.py::test_the_exact_interval_ends_where_a_bet_has_won"),
    ),
    Plant(
        "Student's correction left out",
        "an estimated standard deviation passes for a known one",
        "statistics",
        "montecarlo/confidence.py",
        "np.sqrt(variance / draws) * student(draws, z) * factor",
        "np.sqrt(variance / draws) * z * factor",
        _test("montecarlo/test_confidence.py::test_the_interval_allows_for_an_estimated_deviation"),
    ),
    Plant(
        "skewness narrows",
        "Johnson's term has the wrong sign: skewed draws have narrower intervals",
        "statistics",
        "montecarlo/confidence.py",
        "1 + e / 3 + 5 / 18 * e**2",
        "1 - e / 3 + 5 / 18 * e**2",
        _test("montecarlo/test_confidence.py::test_the_widening_restores_the_exponent"),
    ),
    Plant(
        "a ratio's bend with the wrong sign",
        "the skewness of a ratio of means subtracts what its curvature adds",
        "statistics",
        "montecarlo/evidence.py",
        "return variance, skewness + 1.5 * np.divide(",
        "return variance, skewness - 1.5 * np.divide(",
        _test("montecarlo/test_confidence.py::test_the_skewness_of_a_ratio_counts_its_bend"),
    ),
    Plant(
        "draws that agree are certain",
        "a statistic that never varied has an interval of no width",
        "statistics",
        "montecarlo/confidence.py",
        "np.where(constant, size * np.log(1 / error_rate) / draws, width)",
        "np.where(constant, 0.0, width)",
        _test(
            "montecarlo/test_confidence.py::test_constant_draws_wait_for_what_they_may_have_missed"
        ),
    ),
    Plant(
        "coincidences forgotten",
        "that tokens may repeat is no event that draws may have missed",
        "statistics",
        "montecarlo/evidence.py",
        "if self._may_repeat:",
        "if False:",
        _test("montecarlo/test_false_alarms.py::test_a_coincidence_not_yet_seen_refutes_nothing"),
    ),
    Plant(
        "entries not paid for",
        "each entry is given the whole rate of a wrong REFUTED (Bonferroni forgotten)",
        "statistics",
        "montecarlo/evidence.py",
        "measured.half_width(self.refute_error / self.entries, self.exact)",
        "measured.half_width(self.refute_error, self.exact)",
        _test("planted/test_catchers.py::test_refuted_pays_for_its_entries"),
        unnoticed_by=_test(
            "montecarlo/test_false_alarms.py::test_simultaneous_intervals_hold_at_every_entry_and_look"
        ),
    ),
    Plant(
        "claims not paid for",
        "each claim is given the run's whole error rate",
        "statistics",
        "reports/suite.py",
        "share = error_rate / 2 / max(1, len(judged))",
        "share = error_rate / 2",
        _test("reports/test_suite.py::test_the_error_rate_is_shared_over_what_is_judged"),
    ),
    Plant(
        "REFUTED by a single interval",
        "an entry is out as soon as its own interval is, however many were looked at",
        "statistics",
        "montecarlo/evidence.py",
        "mean, wide = measured.mean, self.simultaneous(measured)",
        "mean, wide = measured.mean, self.single(measured)",
        _test(
            "montecarlo/test_false_alarms.py::"
            "test_true_claims_are_refuted_no_more_often_than_stated"
        ),
    ),
    Plant(
        "CONFIRMED by the simultaneous interval",
        "every entry waits for the interval that holds at all of them: never wrong, and late",
        "statistics",
        "montecarlo/evidence.py",
        "mean, narrow = measured.mean, self.single(measured)",
        "mean, narrow = measured.mean, self.simultaneous(measured)",
        _test("planted/test_catchers.py::test_confirmed_does_not_pay_for_its_entries"),
        unnoticed_by=_test("montecarlo/test_false_alarms.py"),
    ),
    Plant(
        "CONFIRMED where the mean is inside",
        "the estimate is held against the band, and not its interval",
        "statistics",
        "montecarlo/evidence.py",
        "(mean - narrow >= self.low) & (mean + narrow <= self.high)",
        "(mean >= self.low) & (mean <= self.high) & np.isfinite(narrow)",
        _test(
            "montecarlo/test_false_alarms.py::"
            "test_false_claims_are_confirmed_no_more_often_than_stated"
        ),
    ),
    Plant(
        "verdicts before the first look",
        "when the draws end a verdict is taken from however few there are",
        "statistics",
        "montecarlo/campaign.py",
        "enough = measured.draws >= confidence.FIRST_LOOK",
        "enough = measured.draws >= 1",
        _test("montecarlo/test_decide.py::test_nothing_is_decided_before_the_first_look"),
    ),
    Plant(
        "participation by entropy",
        "the exponential of minus the entropy, which is 1/m for uniform attention too",
        "statistics",
        "montecarlo/observables.py",
        "return x.square().sum(-1).mean(1).unsqueeze(1)",
        "return (-torch.special.entr(x).sum(-1)).exp().mean(1).unsqueeze(1)",
        _test("montecarlo/test_observables.py::test_pair_statistics_are_their_definitions"),
    ),
    Plant(
        "zeros above the diagonal counted",
        "a causal row's moments are divided by n_ctx instead of m",
        "statistics",
        "montecarlo/observables.py",
        "(x.tril().pow(power).sum(-1) / counts).mean(1)",
        "(x.tril().pow(power).sum(-1) / counts.max()).mean(1)",
        _test("montecarlo/test_observables.py::test_pair_statistics_are_their_definitions"),
    ),
    Plant(
        "kernel cosine without the root",
        "the mean kernel is divided by the product of its diagonal",
        "statistics",
        "montecarlo/observables.py",
        "return np.asarray(mean[0] / np.sqrt(mean[1] * mean[2]))",
        "return np.asarray(mean[0] / (mean[1] * mean[2]))",
        _test("montecarlo/test_observables.py::test_gradients_of_ratios_are_derivatives"),
    ),
    Plant(
        "delta method without the 2",
        "the gradient of a kurtosis forgets the square of the second moment",
        "statistics",
        "montecarlo/observables.py",
        "-2 * mean[0] / mean[1] ** 3",
        "-mean[0] / mean[1] ** 3",
        _test("montecarlo/test_observables.py::test_gradients_of_ratios_are_derivatives"),
        unnoticed_by=_test(
            "montecarlo/test_decide.py::test_standard_errors_of_ratios_are_those_of_repetition"
        ),
    ),
    Plant(
        "the last position permuted too",
        "reversing the past reverses the query with it",
        "statistics",
        "montecarlo/observables.py",
        "torch.cat([x[:, :-1].flip(1), x[:, -1:]], 1)",
        "x.flip(1)",
        _test("montecarlo/test_symmetry.py::test_the_vectors_move_and_the_weights_stay"),
    ),
    Plant(
        "a residual's scale integrated out once",
        "the estimator with less variance weighs a branch by its scale, not the square",
        "statistics",
        "montecarlo/estimators.py",
        "_scaled(inner, add.scale**2, 0.0, (), ())",
        "_scaled(inner, add.scale, 0.0, (), ())",
        _test("montecarlo/test_estimators.py::test_integrating_maps_out_keeps_the_mean"),
    ),
    Plant(
        "noise of inputs counted as that of weights",
        "the variance between draws of the weights keeps half of that within them",
        "statistics",
        "montecarlo/split.py",
        "pairs.mean(1).var(0, ddof=1) - within / 2",
        "pairs.mean(1).var(0, ddof=1)",
        _test(
            "montecarlo/test_estimators.py::test_components_of_variance_add_up_to_the_plain_variance"
        ),
    ),
    Plant(
        "a kurtosis in each draw",
        "fourth moment and squared variance are divided draw by draw, and the ratios averaged",
        "statistics",
        "montecarlo/observables.py",
        '"kurtosis": Statistic(fourth_and_second, _ratio_to_square, _ratio_to_square_gradient),',
        '"kurtosis": Statistic(\n'
        "        lambda x, q: (power_mean(x, q, 4) / power_mean(x, q, 2) ** 2).unsqueeze(1)\n"
        "    ),",
        _test("contracts/test_measurement.py::Test_kurtosis"),
    ),
    Plant(
        "below for at or below",
        "the distribution function leaves out what lies at the point itself",
        "statistics",
        "montecarlo/observables.py",
        "(values <= point)",
        "(values < point)",
        _test("contracts/test_measurement.py::TestCdfWithAnAtom"),
        unnoticed_by=_test("contracts/test_measurement.py::Test_cdf"),
    ),
    Plant(
        "seed 0 taken for none",
        "a run's JSON says of weights given by seed 0 that none are given",
        "statistics",
        "reports/suite.py",
        'given = f"Weights(seed={question.given.seed})" if question.given else None',
        "seed = question.given and question.given.seed\n"
        '    given = f"Weights(seed={seed})" if seed else None',
        _test("properties/test_round_trips.py::test_a_question_comes_back_from_a_runs_json"),
    ),
    Plant(
        "any verdict for the expected one",
        "the contract of a paper is content with a refutation",
        "statistics",
        "reports/testing.py",
        "return (verdict.expected or CONFIRMED,)",
        "return KNOWLEDGE",
        _test("contracts/test_claims.py::test_a_wrong_claim_fails_in_the_check_that_is_about_it"),
    ),
)

_ENGINE = (
    Plant(
        "a seed for every block",
        "all blocks are drawn from the streams of the first",
        "engine",
        "montecarlo/sampler.py",
        "key = stream_key(conditions.seed, index, path)",
        "key = stream_key(conditions.seed, 0, path)",
        _test("montecarlo/test_bits.py::test_blocks_and_seeds_are_different_draws"),
    ),
    Plant(
        "weights shared between layers",
        "streams are keyed by the last part of a path: every layer has the same matrices",
        "engine",
        "montecarlo/sampler.py",
        "key = stream_key(conditions.seed, index, path)",
        'key = stream_key(conditions.seed, index, path.rpartition(".")[2])',
        _test("theory/test_propagation.py::test_two_layers_against_real_ones"),
    ),
    Plant(
        "32 bits of a key",
        "streams whose keys differ above the 32nd bit are one",
        "engine",
        "nope/streams.py",
        "np.random.SeedSequence(key)",
        "np.random.SeedSequence(key & 0xFFFFFFFF)",
        _test("nope/test_streams.py::test_keys_that_differ_above_bit_32_have_different_streams"),
    ),
    Plant(
        "TF32 allowed",
        "blocks are computed with whatever precision the process allows",
        "engine",
        "montecarlo/sampler.py",
        'torch.set_float32_matmul_precision("highest")',
        'torch.set_float32_matmul_precision("high")',
        _test("montecarlo/test_bits.py::test_blocks_run_on_one_thread_in_full_precision"),
    ),
    Plant(
        "as many threads as there are",
        "sums are added in an order that the machine's cores decide",
        "engine",
        "montecarlo/sampler.py",
        "    torch.set_num_threads(1)\n",
        "    torch.set_num_threads(threads)\n",
        _test("montecarlo/test_bits.py::test_blocks_run_on_one_thread_in_full_precision"),
    ),
    Plant(
        "directions used again",
        "the collapsed sampler has the same directions for values as for keys",
        "engine",
        "montecarlo/collapsed.py",
        "        G = self.draw(weight, (rows, weight.fan_out))\n",
        '        again = f"{rows} by {weight.fan_out}"\n'
        "        G = self.factors.setdefault(again, self.draw(weight, (rows, weight.fan_out)))\n",
        _test("montecarlo/test_collapsed.py::test_every_place_has_the_law_of_the_real_layers"),
    ),
    Plant(
        "evidence of another dtype",
        "kept blocks are found whatever the precision they were computed in",
        "engine",
        "montecarlo/provenance.py",
        '{"digest": digest_of([json.dumps(key).encode()]), **key}',
        '{"digest": digest_of([json.dumps({**key, "dtype": None}).encode()]), **key}',
        _test("montecarlo/test_store.py::test_rows_are_exact_and_found_by_their_whole_key_only"),
    ),
    Plant(
        "evidence of old code",
        "kept blocks are found whatever code computed them",
        "engine",
        "montecarlo/provenance.py",
        '{"digest": digest_of([json.dumps(key).encode()]), **key}',
        '{"digest": digest_of([json.dumps({**key, "sources": None}).encode()]), **key}',
        _test("montecarlo/test_store.py::test_rows_are_exact_and_found_by_their_whole_key_only"),
    ),
    Plant(
        "a recalled block counted twice",
        "a run that goes on takes each kept block's predecessor for it",
        "engine",
        "montecarlo/campaign.py",
        "(moments := self._recall(q, index))",
        "(moments := self._recall(q, max(0, index - 1)))",
        _test(
            "montecarlo/test_store.py::"
            "test_more_draws_and_more_questions_compute_only_what_is_missing"
        ),
    ),
    Plant(
        "answers in the wrong order",
        "what a worker found is paired with the questions backwards",
        "engine",
        "montecarlo/campaign.py",
        "fresh = dict(zip(part.missing, found, strict=True))",
        "fresh = dict(zip(part.missing, found[::-1], strict=True))",
        _test("montecarlo/test_bits.py::test_questions_of_one_shape_keep_their_answers"),
    ),
    Plant(
        "blocks merged as they come",
        "the first finished block is merged, not the next in order",
        "engine",
        "montecarlo/campaign.py",
        "found, seconds = self.waiting.pop(self.merged)",
        "found, seconds = self.waiting.pop(next(iter(self.waiting)))",
        _test("planted/test_catchers.py::test_blocks_merge_in_index_order"),
    ),
    Plant(
        "every chunk from the start",
        "a stream begins anew in each chunk of a block: all chunks are the first",
        "engine",
        "montecarlo/sampler.py",
        "    @cache\n    def source(path: str)",
        "    def source(path: str)",
        _test("contracts/test_measurement.py::test_no_draw_of_a_block_comes_twice"),
        unnoticed_by=_test("contracts/test_measurement.py::TestSampler_real"),
    ),
    Plant(
        "any independent weights collapsed",
        "images of few tokens are drawn as R G where the weights are not Gaussian",
        "engine",
        "montecarlo/collapsed.py",
        "return rows < weight.fan_in and law.independent and law.gaussian",
        "return rows < weight.fan_in and law.independent",
        _test("contracts/test_measurement.py::TestCollapsedUniformWeights"),
        unnoticed_by=_test("contracts/test_measurement.py::TestSampler_collapsed"),
    ),
    Plant(
        "the last block left out",
        "a question ends one block before its draws do",
        "engine",
        "montecarlo/campaign.py",
        "return self.upcoming * self.group.block_size >= self.limit",
        "return (self.upcoming + 1) * self.group.block_size >= self.limit",
        _test("contracts/test_measurement.py::TestInProcess"),
    ),
)

CATALOGUE = _THEORY + _LAYERS + _STATISTICS + _ENGINE
