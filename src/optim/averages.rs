//! Averages of the weights over a run, which replace them at its end: exponential (EMA), of snapshots near the end (SWA),
//! of the last snapshots (LAWA).

use super::{OptimizerState, round_bf16};
use crate::model::Model;
use crate::ops::{Param, Plain};
use crate::recipe::{PR1382, PR1607, PR1994, Recipe};
use burn::tensor::Tensor;

/// Which average a run keeps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Averaging {
    /// None.
    Nothing,
    /// `a = d a + (1 - d) w` after each step from `offset` completed steps on; before them `a = w`.
    Ema {
        /// `d`.
        decay: f64,
        /// The first step whose average differs from the weights.
        offset: usize,
    },
    /// The mean of the weights after every `every` steps whose learning-rate multiplier is below `below`.
    Swa {
        /// Steps between snapshots.
        every: usize,
        /// The multiplier below which they are taken.
        below: f64,
    },
    /// The mean of the last `count` snapshots, one each `every` steps; an EMA of this decay as long as there are not two.
    Lawa {
        /// Snapshots.
        count: usize,
        /// Steps between them.
        every: usize,
        /// The EMA's.
        decay: f64,
    },
}

impl Averaging {
    /// The recipe's.
    pub fn of(recipe: &Recipe) -> Self {
        match recipe.system.as_str() {
            PR1994 if recipe.ema_beta > 0.0 => Self::Ema {
                decay: recipe.ema_beta,
                offset: recipe.ema_warmup_offset.unwrap_or(recipe.lr_warmup_steps),
            },
            PR1607 if recipe.ema_enabled => Self::Ema { decay: recipe.ema_decay, offset: 0 },
            PR1607 if recipe.swa_enabled => {
                Self::Swa { every: recipe.swa_every, below: recipe.swa_start_frac }
            }
            PR1382 if recipe.lawa_enabled => {
                Self::Lawa { count: recipe.lawa_k, every: recipe.lawa_freq, decay: recipe.ema_decay }
            }
            PR1382 => Self::Ema { decay: recipe.ema_decay, offset: 0 },
            _ => Self::Nothing,
        }
    }

    /// The largest number that a row of its state has.
    pub fn last_row(self) -> usize {
        match self {
            Self::Nothing | Self::Ema { .. } => 0,
            Self::Swa { .. } => 1,
            Self::Lawa { count, .. } => count,
        }
    }
}

/// What stands before the number and the parameter's name in the names of its averages' rows of state.
pub const STATE_PREFIX: &str = "average.";

struct Slot<P: Plain> {
    param: Param<P>,
    bf16: bool,
    ema: Option<Tensor<P, 1>>,
    /// The sum of the snapshots (SWA), or each of them, oldest first (LAWA).
    snapshots: Vec<Tensor<P, 1>>,
}

/// The averages of a model's parameters.
pub struct Averages<P: Plain> {
    averaging: Averaging,
    slots: Vec<Slot<P>>,
    /// Snapshots in the sum.
    count: u64,
}

impl<P: Plain> Averages<P> {
    /// The recipe's average of the model's parameters, from their present values on.
    pub fn new(recipe: &Recipe, model: &Model<P>, storage_bf16: bool) -> Self {
        let averaging = Averaging::of(recipe);
        let has_ema = matches!(averaging, Averaging::Ema { .. } | Averaging::Lawa { .. });
        let slot = |spec: &crate::model::spec::Spec| {
            let param = model.params().get(&spec.name)?.clone();
            let ema = has_ema.then(|| param.flat());
            Some(Slot { param, bf16: spec.bf16 && storage_bf16, ema, snapshots: Vec::new() })
        };
        let slots = if averaging == Averaging::Nothing {
            Vec::new()
        } else {
            model.plan().specs.iter().filter_map(slot).collect()
        };
        Self { averaging, slots, count: 0 }
    }

    /// Takes the weights after `steps` completed steps, the last of them at the learning-rate multiplier `lr_mul`.
    pub fn update(&mut self, steps: usize, lr_mul: f64) {
        match self.averaging {
            Averaging::Nothing => {}
            Averaging::Ema { decay, offset } => self.decay(if steps >= offset { decay } else { 0.0 }),
            Averaging::Swa { every, below } => {
                if lr_mul < below && steps.is_multiple_of(every) {
                    self.count += 1;
                    let sums = self.slots.iter_mut().map(|slot| slot.snapshots.pop()).collect();
                    let sums = self.added(sums, [1.0, 1.0]);
                    for (slot, sum) in self.slots.iter_mut().zip(sums) {
                        slot.snapshots = vec![sum];
                    }
                }
            }
            Averaging::Lawa { count, every, decay } => {
                self.decay(decay);
                if steps.is_multiple_of(every) {
                    for slot in &mut self.slots {
                        slot.snapshots.push(slot.param.flat());
                        let surplus = slot.snapshots.len().saturating_sub(count);
                        slot.snapshots.drain(..surplus);
                    }
                    self.count = self.slots.first().map_or(0, |slot| slot.snapshots.len() as u64);
                }
            }
        }
    }

    fn decay(&mut self, decay: f64) {
        let old = self.slots.iter_mut().map(|slot| slot.ema.take().filter(|_| decay > 0.0)).collect();
        let averages = self.added(old, [decay, 1.0 - decay]);
        for (slot, average) in self.slots.iter_mut().zip(averages) {
            slot.ema = Some(average);
        }
    }

    /// `p old + q w` of each parameter, or `w` where there is nothing older.
    fn added(&self, old: Vec<Option<Tensor<P, 1>>>, weights: [f64; 2]) -> Vec<Tensor<P, 1>> {
        let own = |index: usize| self.slots[index].param.flat();
        let has_old: Vec<bool> = old.iter().map(Option::is_some).collect();
        let pairs = old.into_iter().enumerate().filter_map(|(i, old)| Some([old?, own(i)])).collect();
        let mut blended = P::blend(pairs, weights).into_iter();
        let new = |(i, has_old)| if has_old { blended.next() } else { None }.unwrap_or_else(|| own(i));
        has_old.into_iter().enumerate().map(new).collect()
    }

    /// A parameter's average, if there is one yet.
    pub fn average(&self, name: &str) -> Option<Tensor<P, 1>> {
        self.slots.iter().find(|slot| slot.param.name() == name).and_then(|slot| self.of_slot(slot))
    }

    fn of_slot(&self, slot: &Slot<P>) -> Option<Tensor<P, 1>> {
        let share = 1.0 / self.count.max(1) as f64;
        match self.averaging {
            Averaging::Swa { .. } => slot.snapshots.first().map(|sum| sum.clone().mul_scalar(share)),
            Averaging::Lawa { .. } if self.count > 1 => {
                let sum = slot.snapshots.iter().cloned().reduce(|sum, own| sum + own);
                sum.map(|sum| sum.mul_scalar(share))
            }
            _ => slot.ema.clone(),
        }
    }

    /// Whether there is an average to take.
    pub fn is_ready(&self) -> bool {
        self.slots.iter().any(|slot| self.of_slot(slot).is_some())
    }

    /// Replaces the weights by their averages, rounded to bf16 where the weights are.
    pub fn apply(&self) {
        for slot in &self.slots {
            if let Some(average) = self.of_slot(slot) {
                slot.param.set_flat(if slot.bf16 { round_bf16(average) } else { average });
            }
        }
    }

    /// Every row of state: the EMA as number 0, the snapshots from 1.
    pub fn state(&self) -> OptimizerState<P> {
        let mut state = OptimizerState::default();
        for slot in &self.slots {
            let rows = slot
                .ema
                .iter()
                .map(|ema| (0, ema))
                .chain(slot.snapshots.iter().enumerate().map(|(i, s)| (i + 1, s)));
            for (number, row) in rows {
                let name = format!("{STATE_PREFIX}{number}.{}", slot.param.name());
                state.push(name, row.clone(), self.count);
            }
        }
        state
    }

    /// Sets the state from what [`Self::state`] gave; what is missing in it starts anew.
    pub fn restore(&mut self, state: &mut OptimizerState<P>) {
        for slot in &mut self.slots {
            let mut row =
                |number: usize| state.take(&format!("{STATE_PREFIX}{number}.{}", slot.param.name()));
            if let Some((ema, count)) = row(0) {
                slot.ema = Some(ema);
                self.count = count;
            }
            slot.snapshots.clear();
            for number in 1.. {
                let Some((snapshot, count)) = row(number) else { break };
                slot.snapshots.push(snapshot);
                self.count = count;
            }
        }
    }
}
