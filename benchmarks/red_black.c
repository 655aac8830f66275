/* Conjugate gradients in double precision with one red-black Gauss-Seidel V(1,1) cycle per iteration, for seven-point stencils.

   The classical compiled solver that the Poisson benchmark measures against.  Coarse levels come from outside (see
   red_black.py).  Every array has one layer of zero cells around its grid, so that no loop asks for the boundary.  Weights are
   floats: they are small multiples of powers of 1/2 on every level, so nothing is rounded. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    long n[3];      /* cells per axis */
    long s[2];      /* distance of neighbours along the first two axes; along the last it is 1 */
    float *w[3];    /* weight of the link to the cell before, per axis */
    float *inverse; /* 1/diagonal, 0 where there is no unknown */
    float *diagonal;
    double *x, *r; /* correction and residual of the level; those of the first level are the caller's */
} Level;

#define ROWS(l) \
    _Pragma("omp parallel for collapse(2) schedule(static)") for (long i = 1; i <= (l)->n[0]; i++) for (long j = 1; j <= (l)->n[1]; j++)

static inline double around(const Level *l, const double *x, long c) {
    const long a = l->s[0], b = l->s[1];
    return l->w[0][c] * x[c - a] + l->w[0][c + a] * x[c + a] + l->w[1][c] * x[c - b] + l->w[1][c + b] * x[c + b] +
           l->w[2][c] * x[c - 1] + l->w[2][c + 1] * x[c + 1];
}

/* One colour of Gauss-Seidel: cells with i + j + k = colour modulo 2. */
static void sweep(const Level *l, double *x, const double *r, int colour) {
    ROWS(l) {
        const long row = i * l->s[0] + j * l->s[1], first = 1 + ((i + j + 1 + colour) & 1);
        for (long k = first; k <= l->n[2]; k += 2) x[row + k] = l->inverse[row + k] * (r[row + k] + around(l, x, row + k));
    }
}

/* Sums over blocks of the residual, which is zero on the colour that was smoothed last; and the correction set to zero. */
static void restricted(const Level *l, const double *x, const double *r, int colour, const Level *below) {
    ROWS(below) {
        for (long k = 1; k <= below->n[2]; k++) {
            double sum = 0;
            for (long di = 0; di < 2; di++)
                for (long dj = 0; dj < 2; dj++)
                    for (long dk = 0; dk < 2; dk++) {
                        const long p = 2 * i - 1 + di, q = 2 * j - 1 + dj, o = 2 * k - 1 + dk;
                        if (p > l->n[0] || q > l->n[1] || o > l->n[2] || ((p + q + o) & 1) != colour) continue;
                        const long c = p * l->s[0] + q * l->s[1] + o;
                        if (l->inverse[c] > 0) sum += r[c] - l->diagonal[c] * x[c] + around(l, x, c);
                    }
            const long c = i * below->s[0] + j * below->s[1] + k;
            below->r[c] = sum;
            below->x[c] = 0;
        }
    }
}

static void prolonged(const Level *l, double *x, const Level *below) {
    ROWS(l) {
        const long row = i * l->s[0] + j * l->s[1], low = (i + 1) / 2 * below->s[0] + (j + 1) / 2 * below->s[1];
        for (long k = 1; k <= l->n[2]; k++)
            if (l->inverse[row + k] > 0) x[row + k] += below->x[low + (k + 1) / 2];
    }
}

/* x from zero: red, black, coarse correction, black, red. */
static void cycle(Level *levels, long count, long at, double *x, const double *r, const double *dense) {
    Level *l = levels + at;
    if (at == count - 1) {
        const long m = l->n[0] * l->n[1] * l->n[2];
        for (long e = 0; e < m; e++) {
            double sum = 0;
            for (long f = 0; f < m; f++) {
                const long i = f / (l->n[1] * l->n[2]), j = f / l->n[2] % l->n[1], k = f % l->n[2];
                sum += dense[e * m + f] * r[(i + 1) * l->s[0] + (j + 1) * l->s[1] + k + 1];
            }
            const long i = e / (l->n[1] * l->n[2]), j = e / l->n[2] % l->n[1], k = e % l->n[2];
            x[(i + 1) * l->s[0] + (j + 1) * l->s[1] + k + 1] = sum;
        }
        return;
    }
    ROWS(l) { /* the red half of a sweep from zero */
        const long row = i * l->s[0] + j * l->s[1];
        for (long k = 1; k <= l->n[2]; k++) x[row + k] = ((i + j + k) & 1) ? 0 : l->inverse[row + k] * r[row + k];
    }
    sweep(l, x, r, 1);
    restricted(l, x, r, 0, levels + at + 1);
    cycle(levels, count, at + 1, levels[at + 1].x, levels[at + 1].r, dense);
    prolonged(l, x, levels + at + 1);
    sweep(l, x, r, 1);
    sweep(l, x, r, 0);
}

static double product(long size, const double *u, const double *v) {
    double sum = 0;
#pragma omp parallel for simd reduction(+ : sum) schedule(static)
    for (long c = 0; c < size; c++) sum += u[c] * v[c];
    return sum;
}

/* Solve A x = r to |r| <= tolerance |r0|; x is zero and r the right-hand side before.  Returns the iterations; the relative
   recursive residual after each goes to `history`. */
long solve(Level *levels, long count, const double *dense, double *x, double *r, double *z, double *p, double *q,
           double tolerance, long most, double *history) {
    Level *l = levels;
    const long size = (l->n[0] + 2) * l->s[0];
    const double start = sqrt(product(size, r, r));
    double before = 0;
    memset(p, 0, size * sizeof(double));
    for (long step = 1; step <= most; step++) {
        cycle(levels, count, 0, z, r, dense);
        const double now = product(size, r, z), beta = step > 1 ? now / before : 0;
        before = now;
#pragma omp parallel for simd schedule(static)
        for (long c = 0; c < size; c++) p[c] = z[c] + beta * p[c];
        double curvature = 0;
#pragma omp parallel for collapse(2) reduction(+ : curvature) schedule(static)
        for (long i = 1; i <= l->n[0]; i++)
            for (long j = 1; j <= l->n[1]; j++) {
                const long row = i * l->s[0] + j * l->s[1];
                for (long k = 1; k <= l->n[2]; k++) {
                    const long c = row + k;
                    const double image = l->inverse[c] > 0 ? l->diagonal[c] * p[c] - around(l, p, c) : 0;
                    q[c] = image;
                    curvature += image * p[c];
                }
            }
        const double alpha = now / curvature;
        double norm = 0;
#pragma omp parallel for simd reduction(+ : norm) schedule(static)
        for (long c = 0; c < size; c++) {
            x[c] += alpha * p[c];
            r[c] -= alpha * q[c];
            norm += r[c] * r[c];
        }
        history[step - 1] = sqrt(norm) / start;
        if (history[step - 1] <= tolerance) return step;
    }
    return most;
}
