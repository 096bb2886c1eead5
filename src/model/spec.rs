//! What a model's layout says of one parameter.

use super::init::Init;
use crate::ops::weight_form::WeightForm;

/// A parameter as the model's layout states it.
#[derive(Debug, Clone, PartialEq)]
pub struct Spec {
    /// The peers' own name (spec files).
    pub name: String,
    /// Sizes, outermost first; none for a scalar, three at most.
    pub shape: Vec<usize>,
    /// How it starts.
    pub init: Init,
    /// Whether the source system keeps it, and its optimizer's state, in bfloat16.
    pub bf16: bool,
    /// The form in which the ops use it.
    pub form: WeightForm,
    /// Whether training quantises it near the end (the source system's `CastedLinear`).
    pub casted: bool,
}

impl Spec {
    /// A float32 parameter of that name, shape and start, used as it is.
    pub fn new(name: impl Into<String>, shape: &[usize], init: Init) -> Self {
        Self {
            name: name.into(),
            shape: shape.to_vec(),
            init,
            bf16: false,
            form: WeightForm::Full,
            casted: false,
        }
    }

    /// The same, kept in bfloat16 by the source system.
    pub fn in_bf16(self) -> Self {
        Self { bf16: true, ..self }
    }

    /// Number of elements.
    pub fn numel(&self) -> u64 {
        self.shape.iter().map(|size| *size as u64).fold(1, u64::saturating_mul)
    }
}

/// The linear layers of a system: how their weights start, are kept and are used.
#[derive(Debug, Clone, Copy)]
pub struct Linears {
    /// Starts a matrix orthogonally where this holds for its sizes; else as PyTorch starts a linear layer.
    pub orthogonal: Option<fn([usize; 2]) -> bool>,
    /// The form in which the ops use the weights.
    pub form: WeightForm,
    /// Whether the source system keeps them in bfloat16.
    pub bf16: bool,
    /// Whether training quantises them near the end.
    pub casted: bool,
}

impl Linears {
    /// PyTorch's: uniform start, float32, used as they are.
    pub const PLAIN: Self = Self { orthogonal: None, form: WeightForm::Full, bf16: false, casted: false };

    /// How a weight `[outputs, inputs]` starts.
    pub fn start(&self, shape: [usize; 2]) -> Init {
        if self.orthogonal.is_some_and(|rule| rule(shape)) { Init::Orthogonal } else { Init::Linear }
    }

    /// The weight `{name}.weight[outputs, inputs]`.
    pub fn weight(&self, name: &str, shape: [usize; 2]) -> Spec {
        self.weight_from(name, shape, self.start(shape))
    }

    /// The same with another start.
    pub fn weight_from(&self, name: &str, shape: [usize; 2], init: Init) -> Spec {
        Spec {
            bf16: self.bf16,
            form: self.form,
            casted: self.casted,
            ..Spec::new(format!("{name}.weight"), &shape, init)
        }
    }
}
