/* 00_by_hand.c - a whole masked diffusion language model in plain C, to be read first.

   Build:  cc -O2 00_by_hand.c -o by_hand -lm                nothing of dlm.h is inside
   See:    the loss falling while it learns eight sentences, some seconds; then canvases
           being filled in.  dlm.h does the same fast; its tests hold it against this.

   THE IDEA    Some of the tokens of a text x are replaced by masks.  A network reads what
   is left, x_t, and says for each masked position which token it hides: p(x_i | x_t).
     learning  draw a noise level t from (0, 1], mask every token with probability t;
               loss: 1/t times the sum over masked i of -log p(x_i | x_t)
     writing   begin with masks; again and again fill in what the network is surest of

   THE BOUND   L(x) = E_t E [ 1/t sum over masked i of -log p(x_i | x_t) ] >= -log p(x)
   Why 1/t: a token is masked with probability t, so in expectation each counts once at
   every level.  Why a bound: write x token by token in an order o; by the chain rule
   -log p(x | o) is the sum of -log p(x_i | those written before).  That M given ones of R
   tokens are still masked, one of them next, weighs in L as it does in a random order:
       integral over t of 1/t t^M (1-t)^(R-M) = (M-1)! (R-M)! / R!
   So L(x) is the mean over o of -log p(x | o), p(x) is that of p(x | o), and -log of a
   mean is at most the mean of -log (Jensen). */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define T 20                   /* tokens of a text and of a canvas                   */
#define P 4                    /* of these the prompt, which is never masked         */
#define C 32                   /* width: numbers that describe one token             */
#define H 2                    /* attention heads                                    */
#define D (C / H)              /* width of a head                                    */
#define F 64                   /* width of the MLP                                   */
#define V ('z' + 1)            /* vocabulary: the characters themselves              */
#define L 2                    /* layers                                             */
#define MASK '_'               /* the token that stands for "not known"              */

/* ---- operations ------------------------------------------------------------------
   Arrays are row-major, the last index fastest; weights are (out, in).  Forward computes
   values .v, backward gradients .d, and both ADD into what they compute, which begins as
   zeros: so a residual connection is one more sum, and so are gradients that meet.  Every
   line of backward adds dy times the derivative of the forward line that it quotes. */
typedef struct num { double v, d; } num;                   /* x and d(loss)/dx        */

static void add(num *y, num *x, int n, int back)
{
    for (int j = 0; j < n; j++)
        if (!back) y[j].v += x[j].v;
        else x[j].d += y[j].d;                             /* y_j += x_j: by x_j      */
}

/* y += sum over j of a_j b_j; the b_j stand `apart` numbers apart. */
static void dot(num *y, num *a, num *b, int apart, int n, int back)
{
    double sum = 0;
    for (int j = 0; j < n; j++, b += apart) {
        sum += a[j].v * b->v;
        if (back) a[j].d += y->d * b->v;                   /* y += a_j b_j: by a_j    */
        if (back) b->d += y->d * a[j].v;                   /* y += a_j b_j: by b_j    */
    }
    if (!back) y->v += sum;
}

/* y (T,N) += x (T,K) w^T, w (N,K): output n of token t is x_t . w_n */
static void linear(num *y, num *x, num *w, int N, int K, int back)
{
    for (int t = 0; t < T; t++)
        for (int n = 0; n < N; n++) dot(y + t * N + n, x + t * K, w + n * K, 1, K, back);
}

/* Each row x (n) gets a mean square of 1 and is scaled by g (n):  y_j += x_j r g_j,
       r = 1 / sqrt(mean of x_j^2 + eps),  so that  dr/dx_j = -r^3 x_j / n */
static void rmsnorm(num *y, num *x, num *g, int rows, int n, int back)
{
    for (int i = 0; i < rows; i++, y += n, x += n) {
        double square = 0, dr = 0;
        for (int j = 0; j < n; j++) square += x[j].v * x[j].v;
        double r = 1 / sqrt(square / n + 1e-6);
        for (int j = 0; j < n; j++) {
            if (!back) y[j].v += x[j].v * r * g[j].v;
            if (back) g[j].d += y[j].d * x[j].v * r;       /* y_j += x_j r g_j: by g_j */
            if (back) x[j].d += y[j].d * r * g[j].v;       /* y_j += x_j r g_j: by x_j */
            if (back) dr += y[j].d * x[j].v * g[j].v;      /* the same: by r, and r    */
        }
        for (int j = 0; j < n && back; j++) x[j].d -= dr * r * r * r * x[j].v / n;
    }
}

/* Rotary positions: in each head of token t the pair (x_j, x_{j+D/2}) is turned like a
   point in a plane, by the angle t 10^(-2j/D); q . k then tells how far apart two tokens
   are.  Backward turns back: the transpose of a rotation is its inverse. */
static void rope(num *y, num *x, int back)
{
    for (int t = 0; t < T; t++)
        for (int j = 0; j < D / 2; j++) {
            double angle = t * pow(10.0, -2.0 * j / D), c = cos(angle), s = sin(angle);
            for (int a = t * C + j, b = a + D / 2; a < (t + 1) * C; a += D, b += D) {
                if (!back) y[a].v += x[a].v * c - x[b].v * s;
                if (!back) y[b].v += x[b].v * c + x[a].v * s;
                if (back) x[a].d += y[a].d * c + y[b].d * s;         /* both: by x_a  */
                if (back) x[b].d += y[b].d * c - y[a].d * s;         /* both: by x_b  */
            }
        }
}

/* In place:  p_j = e^(a x_j) / sum over k of e^(a x_k).  Backward, from dp:
       dp_j/dx_k = a p_j ([j = k] - p_k)      dx_k = a p_k (dp_k - sum over j dp_j p_j) */
static void softmax(num *x, double a, int n, int back)
{
    double sum = 0, mean = 0, largest = x[0].v;            /* less it, no e^x overflows */
    for (int j = 0; j < n; j++) if (x[j].v > largest) largest = x[j].v;
    for (int j = 0; j < n && !back; j++) sum += x[j].v = exp(a * (x[j].v - largest));
    for (int j = 0; j < n && !back; j++) x[j].v /= sum;
    for (int j = 0; j < n && back; j++) mean += x[j].d * x[j].v;
    for (int j = 0; j < n && back; j++) x[j].d = a * x[j].v * (x[j].d - mean);
}

/* Attention: in each head token i asks (q) all tokens j, before it and after it, how well
   they answer (k), and receives a mean of what they have to say (v):
       p_ij += q_i . k_j    p_i = softmax(p_i / sqrt(D))    o_i += sum over j of p_ij v_j
   q, k, v, o (T,H,D), p (H,T,T).  Backward undoes them from the last to the first. */
static void attend(num *o, num *p, num *q, num *k, num *v, int back)
{
    const double a = 1 / sqrt((double)D);
    for (int h = 0; h < H; h++, o += D, q += D, k += D, v += D)
        for (int i = 0; i < T * C; i += C, p += T) {
            for (int j = 0; j < T && !back; j++) dot(p + j, q + i, k + j * C, 1, D, 0);
            if (!back) softmax(p, a, T, 0);
            for (int d = 0; d < D; d++) dot(o + i + d, p, v + d, C, T, back);
            if (back) softmax(p, a, T, 1);
            for (int j = 0; j < T && back; j++) dot(p + j, q + i, k + j * C, 1, D, 1);
        }
}

/* y += silu(g) u,  silu(g) = g s,  s = 1 / (1 + e^-g),  ds/dg = s (1 - s) */
static void swiglu(num *y, num *g, num *u, int n, int back)
{
    for (int j = 0; j < n; j++) {
        double s = 1 / (1 + exp(-g[j].v)), dsilu = s + g[j].v * s * (1 - s);
        if (!back) y[j].v += g[j].v * s * u[j].v;
        if (back) u[j].d += y[j].d * g[j].v * s;           /* y += silu(g) u: by u    */
        if (back) g[j].d += y[j].d * dsilu * u[j].v;       /* y += silu(g) u: by g    */
    }
}

/* ---- the network -----------------------------------------------------------------
   A token's row x (C) runs through the layers; each adds to it what attention hears from
   other tokens, then what the MLP makes of that.  The order of weights is dlm.h's. */
typedef struct hand_layer {
    num norm1[C], wq[C * C], wk[C * C], wv[C * C], qnorm[D], knorm[D], wo[C * C];
    num norm2[C], wgate[F * C], wup[F * C], wdown[C * F];
} hand_layer;
typedef struct hand_rows {                       /* what a layer computes from x      */
    num x[T * C], n1[T * C], q0[T * C], k0[T * C], q1[T * C], k1[T * C];
    num q[T * C], k[T * C], v[T * C], p[H * T * T], o[T * C];
    num x1[T * C], n2[T * C], gate[T * F], up[T * F], h[T * F];
} hand_rows;
static struct by_hand {
    struct { num embed[V * C]; hand_layer layer[L]; num norm[C]; } w;
    struct { hand_rows layer[L + 1]; num n[T * C], logits[T * V]; } a;
    int canvas[T];                               /* x_t: what the network reads       */
} net;
enum { HAND_WEIGHTS = sizeof net.w / sizeof(num), HAND_STEPS = 17 };

/* A layer is a list of steps: forward runs through it, backward from its end. */
static void step(int l, int s, int back)
{
    hand_layer *w = &net.w.layer[l];
    hand_rows *a = &net.a.layer[l];              /* a[1].x: the next layer's input    */
    switch (s) {
    case 0:  rmsnorm(a->n1, a->x, w->norm1, T, C, back); break;
    case 1:  linear(a->q0, a->n1, w->wq, C, C, back); break;
    case 2:  linear(a->k0, a->n1, w->wk, C, C, back); break;
    case 3:  linear(a->v, a->n1, w->wv, C, C, back); break;
    case 4:  rmsnorm(a->q1, a->q0, w->qnorm, T * H, D, back); break;
    case 5:  rmsnorm(a->k1, a->k0, w->knorm, T * H, D, back); break;
    case 6:  rope(a->q, a->q1, back); break;
    case 7:  rope(a->k, a->k1, back); break;
    case 8:  attend(a->o, a->p, a->q, a->k, a->v, back); break;
    case 9:  add(a->x1, a->x, T * C, back); break;
    case 10: linear(a->x1, a->o, w->wo, C, C, back); break;
    case 11: rmsnorm(a->n2, a->x1, w->norm2, T, C, back); break;
    case 12: linear(a->gate, a->n2, w->wgate, F, C, back); break;
    case 13: linear(a->up, a->n2, w->wup, F, C, back); break;
    case 14: swiglu(a->h, a->gate, a->up, T * F, back); break;
    case 15: add(a[1].x, a->x1, T * C, back); break;
    case 16: linear(a[1].x, a->h, w->wdown, C, F, back); break;
    }
}

/* Logits (T,V): row i says which token stands at i.  The head is the embedding again. */
static void forward(void)
{
    memset(&net.a, 0, sizeof net.a);
    for (int t = 0; t < T; t++)
        add(net.a.layer[0].x + t * C, net.w.embed + net.canvas[t] * C, C, 0);
    for (int i = 0; i < L * HAND_STEPS; i++) step(i / HAND_STEPS, i % HAND_STEPS, 0);
    rmsnorm(net.a.n, net.a.layer[L].x, net.w.norm, T, C, 0);
    linear(net.a.logits, net.a.n, net.w.embed, V, C, 0);
}

static void backward(void)
{
    linear(net.a.logits, net.a.n, net.w.embed, V, C, 1);
    rmsnorm(net.a.n, net.a.layer[L].x, net.w.norm, T, C, 1);
    for (int i = L * HAND_STEPS; i-- > 0;) step(i / HAND_STEPS, i % HAND_STEPS, 1);
    for (int t = 0; t < T; t++)
        add(net.a.layer[0].x + t * C, net.w.embed + net.canvas[t] * C, C, 1);
}

/* ---- learning and writing -------------------------------------------------------- */
static double uniform(void) { return rand() / (RAND_MAX + 1.0); }          /* [0, 1)  */

/* Masks a text (T) at level t and adds what it teaches to the gradients; `share` is one
   over the tokens of an update.  Per masked i, with p = softmax(z_i), y what stood there:
       loss += share / t * -log p_y              dz_v = share / t * (p_v - [v = y]) */
static double learn(const char *text, double t, double share)
{
    double loss = 0;
    for (int i = 0; i < T; i++) net.canvas[i] = i >= P && uniform() < t ? MASK : text[i];
    forward();
    for (int i = 0; i < T; i++) {
        num *z = net.a.logits + i * V;
        if (net.canvas[i] != MASK) continue;
        softmax(z, 1, V, 0);
        loss += share / t * -log(z[(int)text[i]].v);
        for (int v = 0; v < V; v++) z[v].d = share / t * (z[v].v - (v == text[i]));
    }
    backward();
    return loss;
}

/* Update n = 1, 2, ..: along the running mean of the gradient, over the root of that of
   its square; both began at 0, which the two powers make up for (Kingma and Ba 2015). */
static void adam(double rate, int n)
{
    static double mean[HAND_WEIGHTS], square[HAND_WEIGHTS];
    num *w = (num *)&net.w;
    for (int i = 0; i < HAND_WEIGHTS; i++) {
        mean[i] += (1 - 0.9) * (w[i].d - mean[i]);
        square[i] += (1 - 0.99) * (w[i].d * w[i].d - square[i]);
        double m = mean[i] / (1 - pow(0.9, n)), v = square[i] / (1 - pow(0.99, n));
        w[i].v -= rate * m / (sqrt(v) + 1e-8);
        w[i].d = 0;
    }
}

/* One step of writing: of all tokens v at all masks i of the canvas the k likeliest, one
   at a position.  The mask itself is never written. */
static void fill_in(int k)
{
    num *p = net.a.logits;
    forward();
    for (int i = 0; i < T; i++) p[i * V + MASK].v = -INFINITY;
    for (int i = 0; i < T; i++) softmax(p + i * V, 1, V, 0);
    while (k-- > 0) {
        int best = -1;
        for (int i = 0; i < T * V; i++)
            if (net.canvas[i / V] == MASK && (best < 0 || p[i].v > p[best].v)) best = i;
        if (best >= 0) net.canvas[best / V] = best % V;
    }
}

#ifndef BY_HAND_NO_MAIN                          /* the tests include what is above   */
static const char *const texts[] = {
    "the cat likes milk. ", "the dog likes bones.", "the cow likes grass.",
    "the bird likes nuts.", "the fish likes mud. ", "the cat fears dogs. ",
    "the dog fears bears.", "the fish fears cats." };

static void write_on(const char *form, int steps, int k)
{
    for (int i = 0; i < T; i++) net.canvas[i] = form[i];
    for (int s = 0; s <= steps; s++, fill_in(k))
        for (int i = 0; i <= T; i++) putchar(i < T ? net.canvas[i] : '\n');
}

int main(void)
{
    const int n_texts = sizeof texts / sizeof *texts, B = 4, updates = 1200;
    num *w = (num *)&net.w;
    double loss = 0;
    for (int i = 0; i < HAND_WEIGHTS; i++) w[i].v = 0.4 * uniform() - 0.2;
    for (int j = 0; j < L * C; j++) {            /* norms begin with a scale of 1     */
        hand_layer *l = &net.w.layer[j / C];
        l->norm1[j % C].v = l->norm2[j % C].v = net.w.norm[j % C].v = 1;
        l->qnorm[j % D].v = l->knorm[j % D].v = 1;
    }
    for (int n = 1; n <= updates; n++) {
        for (int b = 0; b < B; b++) {            /* levels t spread over (0, 1]       */
            const char *text = texts[(int)(uniform() * n_texts)];
            loss += learn(text, (b + 1 - uniform()) / B, 1.0 / (B * (T - P)));
        }
        adam(3e-3 * (1 - (double)n / updates), n);
        if (n % 200 == 0) printf("update %4d: loss %.3f nats\n", n, loss / 200), loss = 0;
    }
    write_on("the ________________", 8, 2);
    write_on("the ____ likes mud. ", 4, 1);
    write_on("the ____ fears _____", 9, 1);
    return 0;
}
#endif
