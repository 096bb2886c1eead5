//! What `--quant` takes.

use super::clip::BITS;
use super::exports::Export;
use super::ternary::Packing;
use crate::error::{Error, Result};
use std::fmt;
use std::str::FromStr;

/// A quantisation scheme.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// The challenge's `int8_clean_per_row_v1`.
    Int8,
    /// Every float tensor as float16, control tensors as float32.
    Fp16,
    /// Matrices in codes of so many bits (2 to 7), by clip search.
    Int(u8),
    /// Matrices in codes of so many bits (2 to 8), by GPTQ.
    Gptq(u8),
    /// Matrices in ternary codes.
    Ternary,
}

impl Scheme {
    /// The names that `--quant` takes, N being a number of bits from 2 to 8 (`int8` is the challenge's).
    pub const NAMES: [&'static str; 4] = ["fp16", "intN", "gptq-intN", "ternary"];

    /// Our own rules for it (the challenge's for int8).
    pub fn export(self) -> Export {
        match self {
            Self::Int8 => Export::Challenge,
            Self::Fp16 => Export::Fp16,
            Self::Int(bits) | Self::Gptq(bits) => Export::Own { bits: bits.into() },
            // Smaller than 2 bits each under every codec too: by 0.2 to 0.5 % after brotli, 0.8 to 1.1 % after lzma (2 million codes
            // of Gaussian, Laplace and t3 weights).
            Self::Ternary => Export::OwnTernary(Packing::FiveTrits),
        }
    }

    /// Whether it needs Hessians, and so calibration.
    pub fn needs_hessians(self) -> bool {
        matches!(self, Self::Gptq(_))
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int8 => f.write_str("int8"),
            Self::Fp16 => f.write_str("fp16"),
            Self::Int(bits) => write!(f, "int{bits}"),
            Self::Gptq(bits) => write!(f, "gptq-int{bits}"),
            Self::Ternary => f.write_str("ternary"),
        }
    }
}

impl FromStr for Scheme {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let searched = BITS.map(|bits| Self::Int(bits as u8)).filter(|scheme| *scheme != Self::Int(8));
        let gptq = BITS.map(|bits| Self::Gptq(bits as u8));
        [Self::Int8, Self::Fp16, Self::Ternary]
            .into_iter()
            .chain(searched)
            .chain(gptq)
            .find(|scheme| scheme.to_string() == text)
            .ok_or_else(|| {
                Error::input(
                    format!("unknown quantisation {text:?}"),
                    "--quant",
                    format!("one of {} (N from 2 to 8)", Self::NAMES.join(", ")),
                )
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        let by_bits = (2..=7).map(Scheme::Int).chain((2..=8).map(Scheme::Gptq));
        for scheme in by_bits.chain([Scheme::Int8, Scheme::Fp16, Scheme::Ternary]) {
            assert_eq!(scheme.to_string().parse::<Scheme>().unwrap(), scheme);
        }
        for text in [
            "",
            "int",
            "int1",
            "int9",
            "int06",
            "int+6",
            "gptq",
            "gptq-int9",
            "gptq-int-6",
            "INT8",
            "ternary2",
        ] {
            let error = text.parse::<Scheme>().unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains("fp16, intN, gptq-intN, ternary"), "{error}");
        }
    }
}
