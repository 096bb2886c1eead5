//! Training: the step, the run around it, its checkpoints, log and guards.

pub mod checkpoint;
pub mod guards;
pub mod log;
mod resume;
pub mod run;
pub mod session;
pub mod step;
pub mod tensors_file;

pub use session::{Options, Status, Summary, train};
