//! Training: the step, the run around it, its checkpoints, log and guards.

pub mod checkpoint;
pub mod guards;
pub mod log;
pub mod run;
pub mod session;
pub mod step;

pub use session::{Options, Status, Summary, train};
