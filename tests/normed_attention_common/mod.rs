//! Norm, rotation, gain and attention on the host: the gradients of its tests' cases, in f64 or as the reference computes
//! them in less.

use crate::common::{Random, round};
use fairway::backend::Precision;

#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    pub batch: usize,
    pub time: usize,
    pub heads: usize,
    pub groups: usize,
    pub size: usize,
    pub rotated: usize,
    pub gain: bool,
    pub window: Option<usize>,
    pub documents: bool,
}

pub const fn plain([batch, time, heads, groups, size, rotated]: [usize; 6], gain: bool) -> Sizes {
    Sizes { batch, time, heads, groups, size, rotated, gain, window: None, documents: false }
}

pub const fn masked(sizes: [usize; 6], window: Option<usize>, documents: bool) -> Sizes {
    Sizes { window, documents, ..plain(sizes, true) }
}

pub const EPS: f64 = 1e-5;
pub const BASE: f64 = 1e4;

/// The first position: the tables are a part of longer ones.
pub const START: usize = 3;

/// The precision of results, and of every step of a sum.
#[derive(Clone, Copy)]
pub struct Arithmetic {
    pub narrow: Precision,
    pub wide: Precision,
}

impl Arithmetic {
    pub fn of(narrow: Precision) -> Self {
        let wide = if narrow == Precision::F64 { Precision::F64 } else { Precision::F32 };
        Self { narrow, wide }
    }

    fn narrow(self, x: f64) -> f64 {
        round(x, self.narrow)
    }

    fn wide(self, x: f64) -> f64 {
        round(x, self.wide)
    }

    fn dot(self, a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).fold(0.0, |sum, (a, b)| self.wide(sum + a * b))
    }
}

/// q, k and v as projected, the gradient of y, the gain, document starts; values that the precision has.
pub struct Case {
    pub sizes: Sizes,
    pub scale: f64,
    pub inputs: [Vec<f64>; 3],
    pub grad: Vec<f64>,
    pub gain: Vec<f64>,
    pub starts: Vec<i64>,
}

/// The gradients of q, k and v, and of the gain with what each token's head adds to it, `[b, t, h]`, and the root of the
/// sum of its terms' squares.
pub struct Results {
    pub grads: [Vec<f64>; 3],
    pub gain: Vec<f64>,
    pub gain_parts: Vec<f64>,
    pub gain_scale: Vec<f64>,
}

impl Case {
    pub fn new(sizes: Sizes, precision: Precision, seed: u64) -> Self {
        let Sizes { batch, time, heads, groups, size, .. } = sizes;
        let mut random = Random(seed);
        let mut values = |n: usize, scale: &dyn Fn(usize) -> f64| -> Vec<f64> {
            (0..n).map(|i| round(scale(i) * random.uniform(), precision)).collect()
        };
        // Heads of different magnitudes, which the norm takes away.
        let heads_scale = |i: usize| [1.0, 0.5, 3.0][i / size % 3];
        let of_k = batch * time * groups * size;
        let inputs = [
            values(batch * time * heads * size, &heads_scale),
            values(of_k, &heads_scale),
            values(of_k, &|_| 2.0),
        ];
        let grad = values(batch * time * heads * size, &|_| 2.0);
        let gain = values(heads, &|_| 1.0).into_iter().map(|gain| round(gain + 1.5, precision)).collect();
        let mut starts = vec![0; batch * time];
        for at in 0..batch * time {
            let position = at % time;
            let begins = random.uniform().abs() < 4.0 / time as f64 || position == time / 2;
            starts[at] = match position {
                0 => 0,
                _ if begins => position as i64,
                _ => starts[at - 1],
            };
        }
        Self { sizes, scale: 1.5 / (size as f64).sqrt(), inputs, grad, gain, starts }
    }

    fn gain(&self, which: usize, head: usize) -> f64 {
        if which == 0 && self.sizes.gain { self.gain[head % self.sizes.heads] } else { 1.0 }
    }

    fn inverse_rms(x: &[f64]) -> f64 {
        1.0 / (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + EPS).sqrt()
    }

    /// A head turned by the angles of its position, or with `back` the other way.
    fn turned(&self, position: usize, x: &[f64], back: bool, on: Arithmetic) -> Vec<f64> {
        let half = self.sizes.rotated / 2;
        let mut y = x.to_vec();
        for i in 0..half {
            let angle = (START + position) as f64 * BASE.powf(-2.0 * i as f64 / self.sizes.rotated as f64);
            let (cos, sin) = (on.wide(angle.cos()), on.wide(if back { -angle.sin() } else { angle.sin() }));
            y[i] = on.narrow(x[i] * cos + x[i + half] * sin);
            y[i + half] = on.narrow(x[i + half] * cos - x[i] * sin);
        }
        y
    }

    /// The heads of q (0) or k (1) normed and turned, before the gain.
    fn normed(&self, which: usize, on: Arithmetic) -> Vec<f64> {
        let Sizes { time, heads, groups, size, .. } = self.sizes;
        let rows = self.inputs[which].chunks(size).enumerate();
        rows.flat_map(|(head, x)| {
            let r = Self::inverse_rms(x);
            let normed: Vec<f64> = x.iter().map(|x| on.narrow(x * r)).collect();
            self.turned(head / [heads, groups][which] % time, &normed, false, on)
        })
        .collect()
    }

    /// As the reference computes, step by step, in the given arithmetic.
    pub fn results(&self, on: Arithmetic) -> Results {
        let Sizes { batch, time, heads, groups, size, window, documents, .. } = self.sizes;
        let [turned_q, k] = [0, 1].map(|which| self.normed(which, on));
        let q: Vec<f64> =
            turned_q.iter().enumerate().map(|(i, x)| on.narrow(x * self.gain(0, i / size))).collect();
        let v = &self.inputs[2];
        let mut grads = [&q, &k, v].map(|x| vec![0.0; x.len()]);
        for row in 0..batch * time * heads {
            let (head, query, b) = (row % heads, row / heads % time, row / heads / time);
            let first = window.map_or(0, |window| (query + 1).saturating_sub(window));
            let first = if documents { first.max(self.starts[b * time + query] as usize) } else { first };
            let of_key = |key: usize| ((b * time + key) * groups + head / (heads / groups)) * size;
            let at = row * size..(row + 1) * size;
            let scaled: Vec<f64> = q[at.clone()].iter().map(|q| on.narrow(q * self.scale)).collect();
            let scores: Vec<f64> =
                (first..=query).map(|j| on.dot(&scaled, &k[of_key(j)..of_key(j) + size])).collect();
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let exp: Vec<f64> = scores.iter().map(|score| on.wide((score - top).exp())).collect();
            let inverse = 1.0 / exp.iter().fold(0.0, |sum, e| on.wide(sum + e));
            let mut y = vec![0.0; size];
            for (j, e) in (first..=query).zip(&exp) {
                for c in 0..size {
                    y[c] = on.wide(y[c] + on.narrow(*e) * v[of_key(j) + c]);
                }
            }
            let y: Vec<f64> = y.iter().map(|y| on.narrow(y * inverse)).collect();
            let grad: Vec<f64> = self.grad[at.clone()].iter().map(|g| on.wide(g * inverse)).collect();
            let delta = on.dot(&grad, &y);
            let grad: Vec<f64> = grad.into_iter().map(|g| on.narrow(g)).collect();
            for (j, e) in (first..=query).zip(&exp) {
                let from = of_key(j);
                let of_score = on.narrow(e * (on.dot(&grad, &v[from..from + size]) - delta));
                for c in 0..size {
                    let [of_q, of_k, of_v] = &mut grads;
                    of_v[from + c] = on.wide(of_v[from + c] + on.narrow(*e) * grad[c]);
                    of_k[from + c] = on.wide(of_k[from + c] + of_score * scaled[c]);
                    of_q[at.start + c] = on.wide(of_q[at.start + c] + of_score * k[from + c] * self.scale);
                }
            }
        }
        let [of_q, of_k, of_v] =
            grads.map(|grad| -> Vec<f64> { grad.into_iter().map(|x| on.narrow(x)).collect() });
        let (mut gain, mut squares) = (vec![0.0; heads], vec![0.0; heads]);
        let mut gain_parts = vec![0.0; batch * time * heads];
        for (i, (y, grad)) in turned_q.iter().zip(&of_q).enumerate() {
            gain[i / size % heads] += on.narrow(y * grad);
            gain_parts[i / size] += on.narrow(y * grad);
            squares[i / size % heads] += (y * grad) * (y * grad);
        }
        let back = |which: usize, grads: &[f64]| -> Vec<f64> {
            let rows = self.inputs[which].chunks(size).zip(grads.chunks(size)).enumerate();
            rows.flat_map(|(head, (x, grad))| {
                let by = self.gain(which, head);
                let grad: Vec<f64> = grad.iter().map(|grad| on.narrow(grad * by)).collect();
                let u = self.turned(head / [heads, groups][which] % time, &grad, true, on);
                let (r, mean) = (Self::inverse_rms(x), on.dot(x, &u) / size as f64);
                x.iter().zip(&u).map(|(x, u)| on.narrow(r * u - x * r * r * r * mean)).collect::<Vec<f64>>()
            })
            .collect()
        };
        let grads = [back(0, &of_q), back(1, &of_k), of_v];
        Results { grads, gain, gain_parts, gain_scale: squares.into_iter().map(f64::sqrt).collect() }
    }
}
