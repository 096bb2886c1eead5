//! From a trained model to an artifact, and back to what scoring and sampling need.

use super::{Artifact, ByteTableSection, PieceRow, TensorRow};
use crate::data::byte_table::ByteTable;
use crate::data::tokenizer::{Piece, PieceKind, Tokenizer};
use crate::error::{Error, Result};
use crate::host::{HostTensor, HostType};
use crate::model;
use crate::model::plan::{Bank, Plan, ProtectedRows};
use crate::ops::weight_form::WeightForm;
use crate::quant::rows::{self, RowSplit};
use crate::quant::{Context, Cost, Export, Hessians, QuantTensor, Scheme, TensorLoss, losses, quantize_by};
use crate::recipe::{PR1382, PR1607, PR1994, Recipe};
use std::borrow::Cow;
use std::collections::HashSet;

/// Everything that scoring and sampling need of a model, in host memory.
#[derive(Debug)]
pub struct Contents {
    /// The resolved recipe.
    pub recipe: Recipe,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The bytes of each token id.
    pub byte_table: ByteTable,
    /// The weights, dequantised.
    pub params: Vec<HostTensor>,
}

/// The longest recipe that is read from an artifact, in bytes: a hundred times what one needs. What a parser makes of
/// the 8 MiB that fit in the section would take over 1 GiB.
const MAX_RECIPE_BYTES: usize = 1 << 20;

/// The recipe that an artifact states, checked; `place` names the file for errors.
pub fn parse_recipe(toml: &str, place: &str) -> Result<Recipe> {
    if toml.len() > MAX_RECIPE_BYTES {
        let what = format!("recipe of {} bytes", toml.len());
        return Err(Error::input(what, place, format!("at most {MAX_RECIPE_BYTES}")));
    }
    let recipe = Recipe::from_toml(toml, place.as_ref())?;
    model::check(&recipe)?;
    Ok(recipe)
}

/// The names and shapes of an artifact's tensors as the model has them, parts joined to their matrices and matrices to their
/// banks; `place` names the file for errors.
pub fn layout(recipe: &Recipe, tensors: &[TensorRow], place: &str) -> Result<Vec<(String, Vec<usize>)>> {
    let bare = |row: &TensorRow| HostTensor {
        name: row.name.clone(),
        shape: row.shape.clone(),
        dtype: HostType::F32,
        bytes: Vec::new(),
    };
    let joined = join(tensors.iter().map(bare).collect(), &Plan::of(recipe)?, place)?;
    Ok(joined.into_iter().map(|tensor| (tensor.name, tensor.shape)).collect())
}

/// A model made ready for a scheme: its tensors as they are quantised, one by one, and the rules.
#[derive(Debug, Clone)]
pub struct Prepared {
    recipe: Recipe,
    scheme: Scheme,
    export: Export,
    /// Banks by their matrices, and those by their parts.
    params: Vec<HostTensor>,
    splits: Vec<RowSplit>,
    /// The names of the weights, undivided, that take a Hessian.
    calibrated: HashSet<String>,
    context: Context,
}

impl Prepared {
    /// Heads that only training uses stay behind; the matrices of a bank become tensors of their own, and so do the parts of a
    /// matrix with protected rows where it is coded, but for the challenge's forms.
    pub fn new(recipe: &Recipe, params: &[HostTensor], scheme: Scheme) -> Result<Self> {
        let recipe = Recipe { mtp_num_heads: 0, ..recipe.clone() };
        let params: Vec<HostTensor> =
            params.iter().filter(|param| !param.name.starts_with(model::AHEAD)).cloned().collect();
        let plan = Plan::of(&recipe)?;
        let export = export_of(scheme, &recipe);
        // The matrices of a bank have rows, columns and Hessians of their own. (The challenge's int8 knows no banks.)
        let params = match export {
            Export::Challenge | Export::Fp16 => params,
            _ => split_banks(params, &plan.banks)?,
        };
        let bit_linear = plan.specs.iter().filter(|spec| spec.form == WeightForm::BitLinear);
        let context = Context {
            controls: recipe.int8_keep_float_fp32_name_patterns.clone(),
            bit_linear: bit_linear.map(|spec| spec.name.clone()).collect(),
            hessians: Hessians::new(),
        };
        let takes = |tensor: &&HostTensor| export.takes_hessian(tensor, &context);
        let calibrated = params.iter().filter(takes).map(|tensor| tensor.name.clone()).collect();
        let codes =
            |name: &str| params.iter().any(|tensor| tensor.name == name && export.codes(tensor, &context));
        let splits: Vec<RowSplit> = match export {
            Export::Challenge | Export::Fp16 => Vec::new(),
            _ => plan.protected.iter().filter(|matrix| codes(&matrix.name)).map(split_of).collect(),
        };
        let params = rows::split(params, &splits)?;
        Ok(Self { recipe, scheme, export, params, splits, calibrated, context })
    }

    /// Whether the weight of that name takes a Hessian: what calibration is asked for.
    pub fn takes_hessian(&self, name: &str) -> bool {
        self.calibrated.contains(name)
    }

    /// The same with the Hessians of the model's linear layers; a weight without one is coded without.
    pub fn with_hessians(self, hessians: Hessians) -> Self {
        Self { context: Context { hessians, ..self.context }, ..self }
    }

    /// The Hessians that it was given.
    pub fn hessians(&self) -> &Hessians {
        &self.context.hessians
    }

    /// The tensors that the artifact stores, one by one, as live weights.
    pub fn params(&self) -> &[HostTensor] {
        &self.params
    }

    /// By what its codes are pruned to fit a budget: PR #1382 as written has a rule of its own.
    pub fn cost(&self) -> Cost {
        if self.export == Export::Pr1382 { Cost::Step } else { Cost::Error }
    }

    /// The quantised tensors, and everything else that the model needs, beside them.
    ///
    /// # Errors
    /// Those of [`quantize_by`].
    pub fn artifact(&self, tokenizer: &Tokenizer) -> Result<Artifact> {
        let table = ByteTable::new(tokenizer, self.recipe.vocab_size)?;
        // Coded whole, whatever rows are protected ([`rows`]).
        let wholes = match self.splits.as_slice() {
            [] => Cow::Borrowed(&self.params),
            splits => Cow::Owned(rows::join(self.params.clone(), splits, "the model")?),
        };
        let quantized = quantize_by(self.export, &wholes, &self.context)?;
        let piece = |p: &Piece| PieceRow { text: p.text.clone(), score: p.score, kind: p.kind as u8 };
        Ok(Artifact {
            recipe_toml: self.recipe.to_toml(),
            quant: self.scheme.to_string(),
            notes: Default::default(),
            byte_table: ByteTableSection {
                base_bytes: table.base_bytes,
                has_leading_space: table.has_leading_space,
                is_boundary: table.is_boundary,
            },
            tokenizer_kind: tokenizer.kind().to_string(),
            // The byte tokenizer's pieces follow from its kind.
            pieces: if tokenizer.kind() == "byte" {
                Vec::new()
            } else {
                tokenizer.pieces().iter().map(piece).collect()
            },
            tensors: rows::protect(quantized, &self.params, &self.splits)?,
        })
    }

    /// What quantisation costs each tensor of [`Self::artifact`], in the same order.
    pub fn losses(&self, artifact: &Artifact) -> Result<Vec<TensorLoss>> {
        losses(&self.params, &artifact.tensors, &self.context.hessians)
    }
}

impl Artifact {
    /// Quantises `params` by `scheme` and puts everything that the model needs beside them.
    ///
    /// # Errors
    /// Those of [`quantize_by`], and a scheme that needs calibration ([`Prepared`] takes it).
    pub fn assemble(
        recipe: &Recipe,
        tokenizer: &Tokenizer,
        params: &[HostTensor],
        scheme: Scheme,
    ) -> Result<Self> {
        if scheme.needs_hessians() {
            return Err(Error::input(format!("{scheme} without Hessians"), "--quant", "a calibration"));
        }
        Prepared::new(recipe, params, scheme)?.artifact(tokenizer)
    }

    /// What the artifact holds, weights dequantised; `place` names the file for errors.
    pub fn contents(&self, place: &str) -> Result<Contents> {
        let recipe = parse_recipe(&self.recipe_toml, place)?;
        // Before any weight is dequantised: no more memory is taken than the recipe asks for.
        let elements = |tensor: &QuantTensor| tensor.shape.iter().map(|size| *size as u128).product::<u128>();
        let params: u128 = self.tensors.iter().map(elements).sum();
        let expected = model::param_count(&recipe)?;
        if params != u128::from(expected) {
            return Err(Error::input(
                format!("tensors of {params} elements"),
                place,
                format!("the {expected} parameters of its recipe"),
            ));
        }
        let tokenizer = if self.tokenizer_kind == "byte" {
            Tokenizer::byte()
        } else {
            let piece = |row: &PieceRow| {
                let kind = PieceKind::from_code(row.kind.into()).ok_or_else(|| {
                    Error::input(format!("piece kind {}", row.kind), place, "a kind from 1 to 6")
                })?;
                Ok(Piece { text: row.text.clone(), score: row.score, kind })
            };
            let pieces: Result<Vec<Piece>> = self.pieces.iter().map(piece).collect();
            Tokenizer::from_pieces(&self.tokenizer_kind, pieces?, place)?
        };
        let ByteTableSection { base_bytes, has_leading_space, is_boundary } = self.byte_table.clone();
        if base_bytes.len() != recipe.vocab_size {
            return Err(Error::input(
                format!("byte table of {} ids", base_bytes.len()),
                place,
                format!("the recipe's vocab_size={}", recipe.vocab_size),
            ));
        }
        let dequantize = |tensor: &QuantTensor| {
            tensor.dequantize().map_err(|error| match error {
                Error::Input { what, expected, .. } => Error::input(what, place, expected),
                other => other,
            })
        };
        let params: Result<Vec<HostTensor>> = self.tensors.iter().map(dequantize).collect();
        let params = join(params?, &Plan::of(&recipe)?, place)?;
        Ok(Contents {
            recipe,
            tokenizer,
            byte_table: ByteTable { base_bytes, has_leading_space, is_boundary },
            params,
        })
    }
}

/// The rules of a scheme for a recipe: those of the source system, where it has some and the recipe is as its code is written; ours
/// otherwise.
fn export_of(scheme: Scheme, recipe: &Recipe) -> Export {
    let own = scheme.export();
    if !recipe.as_written {
        return own;
    }
    match (own, recipe.system.as_str()) {
        (Export::Own { bits }, PR1607) => {
            Export::Pr1607 { bits, mlp_bits: 0, search_clip: true, fp16_embed: true }
        }
        (Export::Own { bits: 6 }, PR1382) => Export::Pr1382,
        (Export::OwnTernary(_), PR1994) if recipe.ternary_body => Export::Pr1994,
        _ => own,
    }
}

/// How a matrix with protected rows is divided.
fn split_of(matrix: &ProtectedRows) -> RowSplit {
    RowSplit::new(&matrix.name, matrix.rows, &matrix.ranges)
}

/// An artifact's tensors as the model has them: parts joined to their matrices, and matrices to their banks.
fn join(tensors: Vec<HostTensor>, plan: &Plan, place: &str) -> Result<Vec<HostTensor>> {
    let splits: Vec<RowSplit> = plan.protected.iter().map(split_of).collect();
    join_banks(rows::join(tensors, &splits, place)?, &plan.banks, place)
}

/// Each bank's matrices as tensors of their own, where the bank stands.
fn split_banks(tensors: Vec<HostTensor>, banks: &[Bank]) -> Result<Vec<HostTensor>> {
    let mut split = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let Some(bank) = banks.iter().find(|bank| bank.name == tensor.name) else {
            split.push(tensor);
            continue;
        };
        let (count, size) = (bank.members.len(), tensor.bytes.len() / bank.members.len().max(1));
        if tensor.shape.first() != Some(&count) || size == 0 || tensor.bytes.len() % count != 0 {
            return Err(Error::input(
                format!("tensor {} has shape {:?}", tensor.name, tensor.shape),
                &tensor.name,
                format!("{count} matrices"),
            ));
        }
        split.extend(bank.members.iter().zip(tensor.bytes.chunks(size)).map(|(name, bytes)| HostTensor {
            name: name.clone(),
            shape: tensor.shape[1..].to_vec(),
            dtype: tensor.dtype,
            bytes: bytes.to_vec(),
        }));
    }
    Ok(split)
}

/// The inverse: a bank whose first matrix is there is put where that stands. Matrices beside a bank that is whole are left
/// for the model to refuse.
fn join_banks(tensors: Vec<HostTensor>, banks: &[Bank], place: &str) -> Result<Vec<HostTensor>> {
    let is_split = |bank: &&Bank| tensors.iter().all(|tensor| tensor.name != bank.name);
    let banks: Vec<&Bank> = banks.iter().filter(is_split).collect();
    let bank_of = |name: &str| banks.iter().find(|bank| bank.members.iter().any(|member| member == name));
    let mut joined: Vec<HostTensor> = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        let Some(bank) = bank_of(&tensor.name) else {
            joined.push(tensor);
            continue;
        };
        let at = joined.iter().position(|known| known.name == bank.name);
        let done = at.map_or(0, |at| joined[at].shape[0]);
        let fits =
            at.is_none_or(|at| joined[at].shape[1..] == tensor.shape && joined[at].dtype == tensor.dtype);
        if bank.members.get(done) != Some(&tensor.name) || !fits {
            return Err(Error::input(
                format!("tensor {} of shape {:?}", tensor.name, tensor.shape),
                place,
                format!("the matrices of {} in their order and of one shape", bank.name),
            ));
        }
        match at {
            Some(at) => {
                joined[at].shape[0] += 1;
                joined[at].bytes.extend(tensor.bytes);
            }
            None => joined.push(HostTensor {
                name: bank.name.clone(),
                shape: [&[1], tensor.shape.as_slice()].concat(),
                ..tensor
            }),
        }
    }
    Ok(joined)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::BuiltIn;

    #[test]
    fn banks_are_split_and_joined() {
        let bank = |name: &str, members: &[&str]| Bank {
            name: name.into(),
            members: members.iter().map(|m| m.to_string()).collect(),
        };
        let banks = [bank("qo", &["q", "o"]), bank("kv", &["k", "v"])];
        let values = |n: usize, from: f32| (0..n).map(|i| i as f32 + from).collect::<Vec<f32>>();
        let tensors = vec![
            HostTensor::from_f32("qo", &[2, 3, 2], &values(12, 0.0)),
            HostTensor::from_f32("kv", &[2, 1, 2], &values(4, 50.0)),
            HostTensor::from_f32("e", &[2], &values(2, 9.0)),
        ];
        let split = split_banks(tensors.clone(), &banks).unwrap();
        let names: Vec<&str> = split.iter().map(|tensor| tensor.name.as_str()).collect();
        assert_eq!(names, ["q", "o", "k", "v", "e"]);
        assert_eq!((split[1].shape.as_slice(), split[1].to_f32()), ([3, 2].as_slice(), values(6, 6.0)));
        assert_eq!(join_banks(split.clone(), &banks, "here").unwrap(), tensors);
        // One missing at the end is left for the model to find; another order, or another shape, is refused here.
        let mut swapped = split.clone();
        swapped.swap(0, 1);
        assert_eq!(join_banks(swapped, &banks, "here").unwrap_err().exit_code(), 2);
        let mut reshaped = split;
        reshaped[1].shape = vec![2, 3];
        assert_eq!(join_banks(reshaped, &banks, "here").unwrap_err().exit_code(), 2);
        // A matrix beside its whole bank, be that a scalar, stays what it is.
        for whole in [tensors[0].clone(), HostTensor::from_f32("qo", &[], &[1.0])] {
            let both = vec![whole, HostTensor::from_f32("q", &[3, 2], &values(6, 0.0))];
            assert_eq!(join_banks(both.clone(), &banks, "here").unwrap(), both);
        }
        assert!(split_banks(vec![HostTensor::from_f32("qo", &[3, 1], &values(3, 0.0))], &banks).is_err());
    }

    #[test]
    fn the_systems_have_their_own_rules_as_written() {
        let export = |recipe: &str, scheme: &str, as_written: bool| {
            let recipe = Recipe { as_written, ..BuiltIn::find(recipe).unwrap().recipe().unwrap() };
            export_of(scheme.parse().unwrap(), &recipe)
        };
        assert_eq!(export("mamba3-hinge", "int6", true), crate::quant::exports::PR1607);
        assert_eq!(export("mamba3-hinge", "gptq-int6", true), crate::quant::exports::PR1607);
        assert_eq!(export("mamba1-unet", "gptq-int6", true), Export::Pr1382);
        assert_eq!(export("mamba1-unet", "gptq-int5", true), Export::Own { bits: 5 });
        assert_eq!(export("ternary-loop", "ternary", true), Export::Pr1994);
        assert_eq!(export("mamba3-hinge", "int8", true), Export::Challenge);
        for recipe in ["mamba3-hinge", "mamba1-unet", "baseline"] {
            assert_eq!(export(recipe, "int6", false), Export::Own { bits: 6 });
        }
        assert_eq!(export("baseline", "int6", true), Export::Own { bits: 6 });
    }
}
