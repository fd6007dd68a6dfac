#include "score.h"

#include <math.h>
#include <string.h>

static double sigmoid(double y) {
    return 0.5 * (1.0 + tanh(0.5 * y));
}

static int64_t input_width(const sh_probe *probe) {
    switch (probe->type) {
    case SH_MLP: return probe->layers[0].weight.cols;
    case SH_LINEAR:
    case SH_COSINE: break;
    }
    return probe->weight.cols;
}

/* (x - mean) / scale */
static void standardise(const sh_probe *probe, const double *x, const bool *missing, float *out) {
    int64_t width = input_width(probe) / probe->n_readings;
    for (int32_t k = 0; k < probe->n_readings; k++) {
        for (int64_t i = k * width; i < (k + 1) * width; i++) {
            double value = x[i];
            if (probe->mean.data != NULL) {
                value -= (double)sh_value(&probe->mean, 0, i);
            }
            if (probe->scale.data != NULL) {
                value /= (double)sh_value(&probe->scale, 0, i);
            }
            out[i] = missing[k] ? 0.0F : (float)value;
        }
    }
}

/* CAST: cos(x, tanh(P x)), P = c c^T / (c . c); 0 for zeros. */
static double cosine(const sh_probe *probe, const float *x) {
    const sh_tensor *c = &probe->weight;
    double xc = 0.0;
    double cc = 0.0;
    for (int64_t i = 0; i < c->cols; i++) {
        double ci = (double)sh_value(c, 0, i);
        xc += (double)x[i] * ci;
        cc += ci * ci;
    }
    double xx = 0.0;
    double pp = 0.0;
    double xp = 0.0;
    for (int64_t i = 0; i < c->cols; i++) {
        double p = xc / cc * (double)sh_value(c, 0, i);
        p = probe->squash ? tanh(p) : p;
        xx += (double)x[i] * (double)x[i];
        pp += p * p;
        xp += (double)x[i] * p;
    }
    double norms = sqrt(xx) * sqrt(pp);
    if (norms > 0.0 || isnan(norms)) {
        double similarity = xp / norms;
        return isfinite(similarity) ? similarity : NAN;
    }
    return 0.0;
}

static float activate(sh_activation activation, float value) {
    double y = (double)value;
    switch (activation) {
    case SH_RELU: return value > 0.0F || isnan(value) ? value : 0.0F;
    case SH_TANH: return (float)tanh(y);
    case SH_GELU: break;
    }
    return (float)(0.5 * y * (1.0 + erf(y / sqrt(2.0))));
}

/* The share of the harmful class of finite logits. */
static double softmax(const float *logits, int64_t count, int32_t chosen) {
    double highest = (double)logits[0];
    for (int64_t i = 1; i < count; i++) {
        highest = (double)logits[i] > highest ? (double)logits[i] : highest;
    }
    double sum = 0.0;
    for (int64_t i = 0; i < count; i++) {
        sum += exp((double)logits[i] - highest);
    }
    return exp((double)logits[chosen] - highest) / sum;
}

static int64_t widest_layer(const sh_probe *probe) {
    int64_t widest = 0;
    for (int32_t i = 0; i < probe->n_layers; i++) {
        int64_t rows = probe->layers[i].weight.rows;
        widest = rows > widest ? rows : widest;
    }
    return widest;
}

/* `x` is the input; `spare` has room for two widest layers. */
static double mlp(const sh_probe *probe, const float *x, float *spare) {
    int64_t widest = widest_layer(probe);
    float *y = spare;
    for (int32_t i = 0; i < probe->n_layers; i++) {
        const sh_dense *layer = &probe->layers[i];
        y = spare + (i % 2) * widest;
        sh_multiply(&layer->weight, x, y);
        sh_axpy(&layer->bias, 0, 1.0F, y);
        for (int64_t j = 0; i + 1 < probe->n_layers && j < layer->weight.rows; j++) {
            y[j] = activate(probe->activation, y[j]);
        }
        x = y;
    }
    int64_t count = probe->layers[probe->n_layers - 1].weight.rows;
    for (int64_t i = 0; i < count; i++) {
        if (!isfinite(y[i])) {
            return NAN;
        }
    }
    if (probe->softmax) {
        return softmax(y, count, probe->harmful);
    }
    double high = sigmoid((double)y[0]);
    return probe->harmful_low ? 1.0 - high : high;
}

size_t sh_score_scratch(const sh_probe *probe, int32_t n_embd) {
    return (size_t)probe->n_readings * (size_t)n_embd + 2 * (size_t)widest_layer(probe);
}

/* z of the harmful class less the logarithm of the others' summed exponentials. */
static double harmful_logit(const float *z, int64_t count, int32_t chosen) {
    double highest = -HUGE_VAL;
    for (int64_t i = 0; i < count; i++) {
        highest = i != chosen && (double)z[i] > highest ? (double)z[i] : highest;
    }
    double sum = 0.0;
    for (int64_t i = 0; i < count; i++) {
        sum += i != chosen ? exp((double)z[i] - highest) : 0.0;
    }
    return (double)z[chosen] - highest - log(sum);
}

float sh_row_finish(const sh_probe *probe, const float *first, float *scratch) {
    if (probe->type == SH_LINEAR) {
        return isfinite(first[0]) ? first[0] : NAN;
    }
    int64_t widest = widest_layer(probe);
    int64_t count = probe->layers[0].weight.rows;
    float *x = scratch;
    memcpy(x, first, (size_t)count * sizeof *x);
    for (int32_t i = 1; i < probe->n_layers; i++) {
        const sh_dense *layer = &probe->layers[i];
        float *y = scratch + (i % 2) * widest;
        for (int64_t j = 0; j < count; j++) {
            x[j] = activate(probe->activation, x[j]);
        }
        sh_multiply(&layer->weight, x, y);
        sh_axpy(&layer->bias, 0, 1.0F, y);
        count = layer->weight.rows;
        x = y;
    }
    for (int64_t i = 0; i < count; i++) {
        if (!isfinite(x[i])) {
            return NAN;
        }
    }
    if (probe->softmax) {
        return (float)harmful_logit(x, count, probe->harmful);
    }
    return probe->harmful_low ? -x[0] : x[0];
}

/* Whether every state that was read is a float: squashing would hide an infinite one. */
static bool finite(const sh_probe *probe, const double *readings, const bool *missing) {
    int64_t width = input_width(probe) / probe->n_readings;
    for (int32_t k = 0; k < probe->n_readings; k++) {
        for (int64_t i = k * width; i < (k + 1) * width && !missing[k]; i++) {
            if (!isfinite((float)readings[i])) {
                return false;
            }
        }
    }
    return true;
}

double sh_score(const sh_probe *probe, const double *readings, const bool *missing,
                float *scratch) {
    if (!finite(probe, readings, missing)) {
        return NAN;
    }
    float *x = scratch;
    standardise(probe, readings, missing, x);
    if (probe->type == SH_MLP) {
        return mlp(probe, x, scratch + input_width(probe));
    }
    if (probe->type == SH_COSINE) {
        return cosine(probe, x);
    }
    double y = (double)sh_dot(&probe->weight, 0, x) + probe->bias;
    if (!isfinite(y)) {
        return NAN;
    }
    return probe->squash ? sigmoid(y) : y;
}

bool sh_fires(sh_comparator comparator, double score, double threshold) {
    if (!isfinite(score)) {
        return true;
    }
    switch (comparator) {
    case SH_GREATER: return score > threshold;
    case SH_GREATER_EQUAL: return score >= threshold;
    case SH_LESS: return score < threshold;
    case SH_LESS_EQUAL: return score <= threshold;
    }
    return true;
}

size_t sh_intervene_scratch(const sh_intervention *x) {
    if (x->type != SH_HEAD_MATRIX) {
        return 0;
    }
    return (size_t)(x->matrix.data != NULL ? x->matrix.rows : x->u.cols + x->u.rows);
}

void sh_intervene(const sh_intervention *x, const sh_tensor *target, float factor, float *row,
                  float *scratch) {
    if (x->type == SH_ADD_VECTOR) {
        sh_axpy(target, 0, factor, row);
        return;
    }
    if (x->type == SH_PROJECT_OUT) {
        sh_axpy(target, 0, -factor * sh_dot(target, 0, row), row);
        return;
    }
    float *product = scratch;
    int64_t d = x->matrix.rows;
    if (x->matrix.data != NULL) {
        sh_multiply(&x->matrix, row, product);
    } else {
        d = x->u.rows;
        sh_multiply(&x->v, row, scratch + d);
        sh_multiply(&x->u, scratch + d, product);
    }
    for (int64_t i = 0; i < d; i++) {
        row[i] += factor * product[i];
    }
}
