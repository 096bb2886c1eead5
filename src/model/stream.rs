//! The residual stream between blocks: what is to be added to it waits, so that it is added in one pass with the mix
//! and the norm after it.

use crate::ops::stream::{BRANCHES, Branch, Inputs, Mix, Norm, Start};
use crate::ops::{Backend, Param};
use burn::tensor::Tensor;

/// The stream `[n, c]`, with branches and a mix that are not in it yet.
#[derive(Debug, Clone)]
pub(super) struct Stream<B: Backend> {
    x: Tensor<B, 2>,
    branches: Vec<Branch<B>>,
    mix: Option<Mix<B>>,
    /// Whether the value before the mix is wanted.
    keeps: bool,
    kept: Option<Tensor<B, 2>>,
}

impl<B: Backend> Stream<B> {
    pub(super) fn new(x: Tensor<B, 2>) -> Self {
        Self { x, branches: Vec::new(), mix: None, keeps: false, kept: None }
    }

    /// `x += scale[row] y`.
    pub(super) fn push(&mut self, value: Tensor<B, 2>, scale: Option<(&Param<B::Plain>, usize)>) {
        if self.mix.is_some() || self.keeps || self.branches.len() == BRANCHES {
            self.resolve(None);
        }
        let scale = scale.map(|(scale, row)| (scale.clone(), row));
        self.branches.push(Branch { value, scale });
    }

    /// `x = m[0] x + m[1] x0`.
    pub(super) fn mix(&mut self, start: &Start<B>, weight: &Param<B::Plain>) {
        if self.mix.is_some() {
            self.resolve(None);
        }
        self.mix = Some(Mix { start: start.clone(), weight: weight.clone() });
    }

    /// Asks for the stream as it is now; [`Self::kept`] gives it.
    pub(super) fn keep(&mut self) {
        if self.mix.is_some() {
            self.resolve(None);
        }
        self.keeps = true;
    }

    /// What the last [`Self::keep`] asked for.
    pub(super) fn kept(&mut self) -> Tensor<B, 2> {
        if self.keeps {
            self.resolve(None);
        }
        self.kept.take().expect("a stream that was asked to keep its value")
    }

    /// Goes on with `x` in the place of [`Self::value`]; what was kept stays.
    pub(super) fn replace(&mut self, x: Tensor<B, 2>) {
        self.resolve(None);
        self.x = x;
    }

    /// The stream with everything in it.
    pub(super) fn value(&mut self) -> Tensor<B, 2> {
        self.resolve(None);
        self.x.clone()
    }

    /// `scale rms_norm(x)` of the stream with everything in it.
    pub(super) fn normed(&mut self, eps: f64, scale: f64) -> Tensor<B, 2> {
        self.resolve(Some(Norm { eps, scale })).expect("a norm was asked for")
    }

    fn resolve(&mut self, norm: Option<Norm>) -> Option<Tensor<B, 2>> {
        let keeps = std::mem::take(&mut self.keeps);
        let branches = std::mem::take(&mut self.branches);
        let mix = self.mix.take();
        if branches.is_empty() && mix.is_none() && norm.is_none() {
            if keeps {
                self.kept = Some(self.x.clone());
            }
            return None;
        }
        let outputs = B::stream(Inputs { x: self.x.clone(), branches, mix }, norm, keeps);
        self.x = outputs.x;
        self.kept = outputs.added.or(self.kept.take());
        outputs.normed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::ops::{ResidualOps, RmsNormOps};
    use burn::tensor::{DType, TensorData};

    const SHAPE: [usize; 2] = [5, 6];

    fn random(seed: u64, [rows, columns]: [usize; 2]) -> Tensor<Cpu, 2> {
        let mut state = seed;
        let mut draw = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        };
        let values: Vec<f64> = (0..rows * columns + 3).map(|_| draw()).skip(3).collect();
        Tensor::from_data(TensorData::new(values, [rows, columns]), (&Default::default(), DType::F64))
    }

    fn values(x: Tensor<Cpu, 2>) -> Vec<f64> {
        x.into_data().to_vec().expect("f64 values")
    }

    /// A stream beside the same steps taken one by one.
    struct Pair {
        stream: Stream<Cpu>,
        plain: Tensor<Cpu, 2>,
        start: Start<Cpu>,
        scales: Param<Cpu>,
        mix: Param<Cpu>,
        seed: u64,
    }

    impl Pair {
        fn new() -> Self {
            let x = random(1, SHAPE);
            Self {
                stream: Stream::new(x.clone()),
                start: Start::new(random(2, SHAPE)),
                scales: Param::new("s", random(3, [2, SHAPE[1]]), DType::F64),
                mix: Param::new("m", random(4, [2, SHAPE[1]]), DType::F64),
                plain: x,
                seed: 5,
            }
        }

        fn push(&mut self, row: Option<usize>) {
            self.seed += 1;
            let y = random(self.seed, SHAPE);
            self.stream.push(y.clone(), row.map(|row| (&self.scales, row)));
            self.plain = match row {
                Some(row) => Cpu::scaled_add(self.plain.clone(), y, &self.scales, row),
                None => self.plain.clone() + y,
            };
        }

        fn mix(&mut self) {
            self.stream.mix(&self.start, &self.mix);
            self.plain = Cpu::residual_mix(self.plain.clone(), self.start.value(), &self.mix);
        }

        fn same(&mut self, what: &str) {
            assert_eq!(values(self.stream.value()), values(self.plain.clone()), "{what}");
        }

        fn same_norm(&mut self, what: &str) {
            let expected = Cpu::rms_norm(self.plain.clone(), 1e-5).mul_scalar(0.7);
            assert_eq!(values(self.stream.normed(1e-5, 0.7)), values(expected), "{what}");
        }
    }

    #[test]
    fn whatever_waits_is_in_the_value_and_in_the_norm() {
        let mut pair = Pair::new();
        pair.same("nothing");
        pair.same_norm("nothing");
        pair.push(Some(1));
        pair.mix();
        pair.same_norm("a branch and a mix");
        pair.same("after the norm");
        for _ in 0..5 {
            pair.push(None);
            pair.push(Some(0));
        }
        pair.same_norm("many branches");
        pair.mix();
        pair.mix();
        pair.push(Some(0));
        pair.same("two mixes and a branch");
    }

    #[test]
    fn what_is_kept_is_the_stream_as_it_was() {
        // Asked for with a branch waiting, with a mix waiting, with nothing; resolved by what comes after, or on demand.
        for case in 0..6 {
            let mut pair = Pair::new();
            match case % 3 {
                0 => pair.push(Some(1)),
                1 => pair.mix(),
                _ => {}
            }
            pair.stream.keep();
            let expected = values(pair.plain.clone());
            if case < 3 {
                pair.mix();
                pair.same_norm("the mix after it");
            }
            assert_eq!(values(pair.stream.kept()), expected, "case {case}");
            pair.push(Some(0));
            pair.same("what comes after");
        }
        let mut pair = Pair::new();
        pair.push(None);
        pair.stream.keep();
        let expected = values(pair.plain.clone());
        pair.push(Some(0));
        pair.same_norm("a branch after it");
        let doubled = pair.plain.clone() + pair.plain.clone();
        pair.stream.replace(doubled.clone());
        pair.plain = doubled;
        pair.same("replaced");
        assert_eq!(values(pair.stream.kept()), expected, "a branch after it");
    }
}
