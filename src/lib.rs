//! Fairway trains, compresses and scores the best language model that fits in 16,000,000 bytes.
//!
//! One model definition, generic over a Burn backend, runs on the CPU, on any wgpu adapter (WGSL kernels) and on CUDA
//! (CUDA C++ kernels compiled at run time), and computes the same function on each.

#![deny(missing_docs)]

pub mod artifact;
pub mod backend;
pub mod bench;
pub mod calibrate;
pub mod cli;
pub mod data;
pub mod error;
pub mod eval;
pub mod files;
pub mod host;
pub mod model;
pub mod ops;
pub mod optim;
pub mod parity;
pub mod quant;
pub mod recipe;
pub mod report;
pub mod train;

pub use error::{Error, Result};
