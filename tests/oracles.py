"""Each layer's distribution written a second time: from the paper's formula, in NumPy, in float64.

The oracle of ``lvsoftmax/layers/x.py`` is ``x(layer, hidden: np.ndarray) -> np.ndarray``: log-probabilities
``[N, V]`` from the layer's parameters and buffers. It shares no code with the layer, may be slow and loop over words,
and follows the paper's equation rather than the implementation.
"""

import numpy as np


def array(tensor) -> np.ndarray:
    """A parameter or buffer as float64."""
    return tensor.detach().double().numpy()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def dense_logits(layer, hidden: np.ndarray) -> np.ndarray:
    """``w_v . h + b_v`` of every word."""
    bias = 0.0 if layer.bias is None else array(layer.bias)
    return hidden @ array(layer.weight).T + bias


def full_softmax(layer, hidden: np.ndarray) -> np.ndarray:
    """Bengio et al. 2003, equation 1, its logits divided by the temperature; Gemma Team 2024, section 2: the cap."""
    logits = dense_logits(layer, hidden) * array(layer.inverse_temperature)
    return log_softmax(logits if layer.softcap is None else layer.softcap * np.tanh(logits / layer.softcap))


def log_normalised(weight: np.ndarray) -> np.ndarray:
    """Positive weights over their sum, as logarithms."""
    return np.log(weight) - np.log(weight.sum(-1, keepdims=True))


def spherical_softmax(layer, hidden: np.ndarray) -> np.ndarray:
    """De Brebisson & Vincent 2016, the spherical softmax: ``(o_k^2 + epsilon) / sum_i (o_i^2 + epsilon)``."""
    return log_normalised(dense_logits(layer, hidden) ** 2 + layer.normaliser.epsilon)


def taylor_softmax(layer, hidden: np.ndarray) -> np.ndarray:
    """De Brebisson & Vincent 2016, the Taylor softmax: ``(1 + o_k + o_k^2 / 2) / sum_i (1 + o_i + o_i^2 / 2)``."""
    logits = dense_logits(layer, hidden)
    return log_normalised(1 + logits + logits**2 / 2)


def sig_softmax(layer, hidden: np.ndarray) -> np.ndarray:
    """Kanai et al. 2018: ``exp(z_k) sigmoid(z_k) / sum_m exp(z_m) sigmoid(z_m)``."""
    logits = dense_logits(layer, hidden)
    return log_normalised(np.exp(logits) / (1 + np.exp(-logits)))


def hierarchical_softmax(layer, hidden: np.ndarray) -> np.ndarray:
    """Morin & Bengio 2005, section 3: the decisions on the way from each word up to the root, one by one."""
    weight, bias, pace = array(layer.weight), array(layer.bias), array(layer.pace)
    log_prob = np.zeros((len(hidden), layer.vocab_size))
    for word, branch in enumerate(layer.word_branch.tolist()):
        while branch >= 0:
            node, side = divmod(branch, 2)
            score = pace[node] * (hidden @ weight[node] + bias[node])
            log_prob[:, word] -= np.logaddexp(0, score if side else -score)
            branch = int(layer.node_branch[node])
    return log_prob


def adaptive_softmax(layer, hidden: np.ndarray) -> np.ndarray:
    """Grave et al. 2017, section 4: a word of the head at once, any other through its cluster's entry in the head."""

    def scores(x, weight, bias):
        return x @ array(weight).T + (0.0 if bias is None else array(bias))

    log_head = log_softmax(scores(hidden, layer.head_weight, layer.head_bias))
    clusters = len(layer.tail_weights)
    shortlist = log_head.shape[1] - clusters
    columns = [log_head[:, word] for word in range(shortlist)]
    for k in range(clusters):
        reduced = hidden @ array(layer.projections[k]).T
        bias = None if layer.tail_biases is None else layer.tail_biases[k]
        within = log_softmax(scores(reduced, layer.tail_weights[k], bias))
        columns += [log_head[:, shortlist + k] + within[:, word] for word in range(within.shape[1])]
    return np.stack(columns, 1)


def class_softmax(layer, hidden: np.ndarray) -> np.ndarray:
    """Goodman 2001, equation 2: the probability of a class, times that of a word among the words of its class."""
    weight, bias = array(layer.weight), array(layer.bias)
    class_log_prob = log_softmax(hidden @ array(layer.class_weight).T + array(layer.class_bias))
    word_of_row = {row: word for word, row in enumerate(layer.row.tolist())}
    log_prob = np.full((len(hidden), layer.vocab_size), np.nan)
    bound = layer.bound.tolist()
    for c in range(len(bound) - 1):
        rows = range(bound[c], bound[c + 1])
        within = log_softmax(np.stack([hidden @ weight[row] + bias[row] for row in rows], 1))
        for place, row in enumerate(rows):
            log_prob[:, word_of_row[row]] = class_log_prob[:, c] + within[:, place]
    return log_prob


def mixture_of_softmaxes(layer, hidden: np.ndarray) -> np.ndarray:
    """Yang et al. 2018, section 2.4: probabilities of the experts, weighted and added."""
    prior = np.exp(log_softmax(hidden @ array(layer.prior_weight).T))
    weight, bias = array(layer.weight), array(layer.bias)
    width = weight.shape[1]
    probability = np.zeros((len(hidden), layer.vocab_size))
    for e in range(prior.shape[1]):
        rows = slice(e * width, (e + 1) * width)
        context = np.tanh(hidden @ array(layer.latent_weight)[rows].T + array(layer.latent_bias)[rows])
        probability += prior[:, e : e + 1] * np.exp(log_softmax(context @ weight.T + bias))
    return np.log(probability)


def sampled_softmax(layer, hidden: np.ndarray) -> np.ndarray:
    """Jean et al. 2015, section 3: the words drawn matter in training only."""
    return log_softmax(dense_logits(layer, hidden))


def differentiated_softmax(layer, hidden: np.ndarray) -> np.ndarray:
    """Chen, Grangier & Auli 2015: a block-diagonal table; Grave et al. 2017: each block reads a projection."""
    if layer.projection is not None:
        hidden = hidden @ array(layer.projection).T
    table = np.zeros((layer.vocab_size, hidden.shape[1]))
    row = column = 0
    for block in map(array, layer.weights):
        table[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return log_softmax(hidden @ table.T + array(layer.bias))


def importance_sampled_softmax(layer, hidden: np.ndarray) -> np.ndarray:
    """Bengio & Senecal 2003: what the estimate of the gradient is an estimate for."""
    return log_softmax(dense_logits(layer, hidden))


def noise_contrastive_estimation(layer, hidden: np.ndarray) -> np.ndarray:
    """Mnih & Teh 2012, equation 1: the normaliser that training takes for known drops out."""
    return log_softmax(dense_logits(layer, hidden) - array(layer.log_normaliser))


def negative_sampling(layer, hidden: np.ndarray) -> np.ndarray:
    """Levy & Goldberg 2014, equation 7, solved for p: the optimal score is ``log p - log(k q)``."""
    return log_softmax(dense_logits(layer, hidden) + array(layer.log_expected))


def self_normalized_softmax(layer, hidden: np.ndarray) -> np.ndarray:
    """Devlin et al. 2014, equation 2: the penalty is a matter of training."""
    return log_softmax(dense_logits(layer, hidden))


def self_normalized_objective(logits, target, alpha) -> np.ndarray:
    """Devlin et al. 2014, equation 4, its sign turned: log-likelihood less ``alpha log^2 Z``."""
    values = []
    for token, word in enumerate(target):
        log_partition = np.log(np.exp(logits[token]).sum())
        values.append(-(logits[token, word] - log_partition - alpha * log_partition**2))
    return np.array(values)


def infrequent_normalization(layer, hidden: np.ndarray) -> np.ndarray:
    """Andreas & Klein 2015: normalising some tokens only is a matter of training."""
    return log_softmax(dense_logits(layer, hidden))


def infrequent_normalization_objective(logits, target, selected, strength, penalty) -> np.ndarray:
    """Chen et al. 2015, token by token: the score, and for the selected the penalty over the rate of selection."""
    rate = len(selected) / len(target)
    values = []
    for token, word in enumerate(target):
        value = -logits[token, word]
        if token in selected:
            log_partition = np.log(np.exp(logits[token]).sum())
            value += log_partition / rate if penalty == "linear" else strength / rate * log_partition**2
        values.append(value)
    return np.array(values)


def target_sampling(layer, hidden: np.ndarray) -> np.ndarray:
    """Jean et al. 2015, equation 6, over the whole vocabulary: candidates matter in training only."""
    return log_softmax(dense_logits(layer, hidden))


def black_out(layer, hidden: np.ndarray) -> np.ndarray:
    """Ji et al. 2016, equation 1: training's weighted softmax over few words stands for this one."""
    return log_softmax(dense_logits(layer, hidden))


def one_versus_each(layer, hidden: np.ndarray) -> np.ndarray:
    """Titsias 2016, equation 1: the softmax that training bounds."""
    return log_softmax(dense_logits(layer, hidden))


def sparsemax_output(layer, hidden: np.ndarray) -> np.ndarray:
    """Martins & Astudillo 2016, algorithm 1: the words in falling order, as many as stay above the threshold."""
    logits = dense_logits(layer, hidden)
    log_prob = np.full_like(logits, -np.inf)
    for token, z in enumerate(logits):
        falling = np.sort(z)[::-1]
        size = max(k for k in range(1, len(z) + 1) if 1 + k * falling[k - 1] > falling[:k].sum())
        tau = (falling[:size].sum() - 1) / size
        log_prob[token, z > tau] = np.log(z[z > tau] - tau)
    return log_prob


def entmax_output(layer, hidden: np.ndarray) -> np.ndarray:
    """Peters, Niculae & Martins 2019, equation 10 and algorithm 1: the threshold closed in on from both sides."""
    logits = dense_logits(layer, hidden)
    log_prob = np.full_like(logits, -np.inf)
    for token, z in enumerate((layer.alpha - 1) * logits):
        low, high = z.max() - 1, z.max()
        for _ in range(100):
            tau = (low + high) / 2
            above = np.where(z > tau, z - tau, 0) ** (1 / (layer.alpha - 1))
            low, high = (tau, high) if above.sum() > 1 else (low, tau)
        log_prob[token, above > 0] = np.log(above[above > 0])
    return log_prob


def fenchel_young_objective(logit: np.ndarray, log_prob: np.ndarray, target, alpha: float) -> np.ndarray:
    """Blondel, Martins & Niculae 2020, section 3: ``p . z + H(p) - z_target`` with Tsallis' entropy H."""
    values = []
    for z, p, word in zip(logit, np.exp(log_prob), target, strict=True):
        entropy = sum(x - x**alpha for x in p) / (alpha * (alpha - 1))
        values.append(p @ z + entropy - z[word])
    return np.array(values)


def sampled_softmax_objective(target, ids, target_logit, logit, target_log_expected, log_expected) -> np.ndarray:
    """Jean et al. 2015, section 3, word by word: the target among itself and the other words drawn."""
    values = []
    for token, word in enumerate(target):
        own = np.exp(target_logit[token] - target_log_expected[token])
        others = [np.exp(logit[token, k] - log_expected[k]) for k, drawn in enumerate(ids) if drawn != word]
        values.append(-np.log(own / (own + sum(others))))
    return np.array(values)


def importance_sampling_objective(target_logit, logit, log_q) -> np.ndarray:
    """Bengio & Senecal 2003, as a value: the mean of ``exp(s_k) / q_k`` stands for the partition."""
    values = []
    for token, score in enumerate(target_logit):
        weights = [np.exp(logit[token, k]) / np.exp(log_q[k]) for k in range(len(log_q))]
        values.append(-score + np.log(sum(weights) / len(weights)))
    return np.array(values)


def noise_contrastive_objective(target_logit, logit, target_log_q, log_q, count) -> np.ndarray:
    """Mnih & Teh 2012, equation 8, in probabilities: P(word is data) = p / (p + k q), with p = exp(s)."""
    values = []
    for token, score in enumerate(target_logit):
        value = -np.log(np.exp(score) / (np.exp(score) + count * np.exp(target_log_q[token])))
        for k in range(count):
            noise = count * np.exp(log_q[k])
            value -= np.log(noise / (np.exp(logit[token, k]) + noise))
        values.append(value)
    return np.array(values)


def black_out_objective(target, ids, target_logit, logit, target_log_q, log_q) -> np.ndarray:
    """Ji et al. 2016, equations 5 and 6: the weighted softmax word by word, weights ``1 / q``."""
    values = []
    for token, word in enumerate(target):
        own = np.exp(target_logit[token]) / np.exp(target_log_q[token])
        others = [np.exp(logit[token, k]) / np.exp(log_q[k]) for k, drawn in enumerate(ids) if drawn != word]
        total = own + sum(others)
        values.append(-np.log(own / total) - sum(np.log(1 - other / total) for other in others))
    return np.array(values)


def one_versus_each_objective(target, ids, target_logit, logit, log_expected) -> np.ndarray:
    """Titsias 2016, equation 5, its sum over the other words estimated by importance sampling."""
    values = []
    for token, word in enumerate(target):
        terms = [
            np.log(1 / (1 + np.exp(-(target_logit[token] - logit[token, k])))) / np.exp(log_expected[k])
            for k, drawn in enumerate(ids)
            if drawn != word
        ]
        values.append(-sum(terms))
    return np.array(values)


def target_sampling_objective(logits, target, candidates) -> np.ndarray:
    """Jean et al. 2015, section 3.1: the softmax over the target vocabulary of a partition of the text."""
    values = []
    for token, word in enumerate(target):
        assert word in candidates
        values.append(-logits[token, word] + np.log(sum(np.exp(logits[token, w]) for w in candidates)))
    return np.array(values)
