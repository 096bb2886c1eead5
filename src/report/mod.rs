//! What a run leaves for people to look at.

pub mod curve;
pub mod losses;
pub mod submission;
