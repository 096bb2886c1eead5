//! Training: the run around the steps, its checkpoints, log and guards.

pub mod checkpoint;
pub mod guards;
pub mod log;
pub mod options;
mod resume;
pub mod run;
pub mod session;
pub mod tensors_file;

pub use options::{Options, Status, Summary};
pub use session::train;
