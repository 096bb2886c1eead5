//! From a trained model to an artifact, and back to what scoring and sampling need.

use super::{Artifact, ByteTableSection, PieceRow};
use crate::data::byte_table::ByteTable;
use crate::data::tokenizer::{Piece, PieceKind, Tokenizer};
use crate::error::{Error, Result};
use crate::host::HostTensor;
use crate::model;
use crate::quant::{QuantTensor, Scheme, quantize};
use crate::recipe::Recipe;

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

impl Artifact {
    /// Quantises `params` by `scheme` and puts everything that the model needs beside them.
    pub fn assemble(
        recipe: &Recipe,
        tokenizer: &Tokenizer,
        params: &[HostTensor],
        scheme: Scheme,
    ) -> Result<Self> {
        let table = ByteTable::new(tokenizer, recipe.vocab_size)?;
        // Heads that only training uses stay behind.
        let recipe = Recipe { mtp_num_heads: 0, ..recipe.clone() };
        let params: Vec<HostTensor> =
            params.iter().filter(|param| !param.name.starts_with(model::AHEAD)).cloned().collect();
        let piece = |p: &Piece| PieceRow { text: p.text.clone(), score: p.score, kind: p.kind as u8 };
        Ok(Self {
            recipe_toml: recipe.to_toml(),
            quant: scheme.to_string(),
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
            tensors: quantize(scheme, &params, &recipe.int8_keep_float_fp32_name_patterns)?,
        })
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
        let params: Result<Vec<HostTensor>> = self.tensors.iter().map(|tensor| tensor.dequantize()).collect();
        Ok(Contents {
            recipe,
            tokenizer,
            byte_table: ByteTable { base_bytes, has_leading_space, is_boundary },
            params: params?,
        })
    }
}
