//! The windows that an evaluation walks over, as data: where each begins, and which of its positions it scores.
//!
//! `total` targets lie behind one another; the input at position `p` is token `p`, its target token `p + 1`. A window of
//! `len` positions from `start` scores the targets `start + from .. start + to`, each with what is before it in the window
//! as its context.

use crate::error::{Error, Result};
use std::fmt;
use std::ops::Range;
use std::str::FromStr;

/// One window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// The first position.
    pub start: usize,
    /// Positions.
    pub len: usize,
    /// The first position within the window that is scored.
    pub from: usize,
    /// One past the last that is.
    pub to: usize,
}

impl Window {
    /// The targets that it scores.
    pub fn targets(&self) -> Range<usize> {
        self.start + self.from..self.start + self.to
    }
}

/// Who says where windows begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Windows {
    /// Every target once: each window ends where the next `stride` targets end.
    EachOnce,
    /// As PR #1382 (spec/pr1382.md section 8): from every multiple of the stride below `total`, the last ones cut short;
    /// all of these score the last `stride` targets again.
    Pr1382,
    /// As PR #1607 (spec/pr1607.md section 7): whole windows only, and one more that ends with the last target where none
    /// does; that one scores `stride` targets, some of them again.
    Pr1607,
}

impl Windows {
    /// Every kind.
    pub const ALL: [Self; 3] = [Self::EachOnce, Self::Pr1382, Self::Pr1607];

    fn name(self) -> &'static str {
        match self {
            Self::EachOnce => "each-once",
            Self::Pr1382 => "pr1382",
            Self::Pr1607 => "pr1607",
        }
    }

    /// The windows of at most `len` positions over `total` targets, each `stride` after the one before.
    ///
    /// The first scores all its targets, the others their last `stride`. Errors (input): a stride of 0 or over `len`, or
    /// fewer targets than PR #1607's whole windows take.
    pub fn list(self, total: usize, len: usize, stride: usize) -> Result<Vec<Window>> {
        check_stride(len, stride)?;
        if total == 0 || (self == Self::Pr1607 && total < len) {
            let least = if self == Self::Pr1607 { len } else { 1 };
            return Err(Error::input(
                format!("{total} targets"),
                "the validation tokens",
                format!("at least {least} for windows {self}"),
            ));
        }
        Ok(match self {
            Self::EachOnce => each_once(len, total, len, stride),
            Self::Pr1382 => {
                (0..total).step_by(stride).map(|start| last_of(start, total, len, stride)).collect()
            }
            Self::Pr1607 => {
                let mut starts: Vec<usize> = (0..=total - len).step_by(stride).collect();
                if starts.last().is_some_and(|last| last + len < total) {
                    starts.push(total - len);
                }
                starts.into_iter().map(|start| last_of(start, total, len, stride)).collect()
            }
        })
    }

    /// As [`Self::EachOnce`], but the first window scores at most `first` targets: those after it have all that is
    /// before them as their context until that is `len` positions.
    pub fn each_once_after(first: usize, total: usize, len: usize, stride: usize) -> Result<Vec<Window>> {
        check_stride(len, stride)?;
        Ok(each_once(first.min(len), total, len, stride))
    }

    /// PR #1382's windows for test-time training: a later start with fewer than `stride` targets left is dropped, since
    /// the one before has scored them.
    pub fn pr1382_training(total: usize, len: usize, stride: usize) -> Result<Vec<Window>> {
        let mut windows = Self::Pr1382.list(total, len, stride)?;
        windows.retain(|window| window.start == 0 || window.len >= stride);
        Ok(windows)
    }
}

impl fmt::Display for Windows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Windows {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|windows| windows.name() == text);
        found.ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            Error::input(format!("windows {text}"), "--windows", format!("one of {names}"))
        })
    }
}

/// Refuses a stride that leaves targets out, or scores none.
pub fn check_stride(len: usize, stride: usize) -> Result<()> {
    if (1..=len).contains(&stride) {
        return Ok(());
    }
    let expected = format!("1 to the {len} tokens of a window");
    Err(Error::input(format!("stride {stride}"), "--stride", expected))
}

/// The window from `start`, cut to the targets that there are, scoring its last `stride`; the first scores all.
fn last_of(start: usize, total: usize, len: usize, stride: usize) -> Window {
    let len = len.min(total - start);
    let from = if start == 0 { 0 } else { len.saturating_sub(stride) };
    Window { start, len, from, to: len }
}

fn each_once(first: usize, total: usize, len: usize, stride: usize) -> Vec<Window> {
    let first = first.min(total);
    let mut windows = vec![Window { start: 0, len: first, from: 0, to: first }];
    windows.extend((first..total).step_by(stride).map(|scored| {
        let end = (scored + stride).min(total);
        let start = end.saturating_sub(len);
        Window { start, len: end - start, from: scored - start, to: end - start }
    }));
    windows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times_scored(windows: &[Window], total: usize) -> Vec<usize> {
        let mut times = vec![0; total];
        windows.iter().flat_map(Window::targets).for_each(|target| times[target] += 1);
        times
    }

    fn starts(windows: &[Window]) -> Vec<usize> {
        windows.iter().map(|window| window.start).collect()
    }

    #[test]
    fn each_once_scores_every_target_once_with_as_much_context_as_there_is() {
        for total in 1..40 {
            for len in 1..12 {
                for stride in 1..=len {
                    let windows = Windows::EachOnce.list(total, len, stride).unwrap();
                    assert_eq!(times_scored(&windows, total), vec![1; total], "{total} {len} {stride}");
                    for window in &windows {
                        assert!(window.len <= len && window.start + window.len <= total);
                        assert_eq!(window.to, window.len);
                        assert!(window.start == 0 || window.len == len);
                        // All but the last score exactly `stride`, so that no context is given away.
                        let last = window.start + window.len == total;
                        assert!(window.start == 0 || last || window.to - window.from == stride);
                        assert!(window.from == 0 || window.from >= len - stride);
                    }
                    assert!(starts(&windows).is_sorted());
                }
            }
        }
        let side_by_side = Windows::EachOnce.list(12, 4, 4).unwrap();
        assert_eq!(starts(&side_by_side), [0, 4, 8]);
        assert!(side_by_side.iter().all(|window| (window.len, window.from, window.to) == (4, 0, 4)));
        let tail = Windows::EachOnce.list(11, 4, 3).unwrap();
        assert_eq!(starts(&tail), [0, 3, 6, 7]);
        assert_eq!(tail[3], Window { start: 7, len: 4, from: 3, to: 4 });
    }

    #[test]
    fn a_short_first_window_is_followed_by_growing_ones() {
        let windows = Windows::each_once_after(3, 12, 8, 2).unwrap();
        let all: Vec<[usize; 4]> = windows.iter().map(|w| [w.start, w.len, w.from, w.to]).collect();
        let expected = [[0, 3, 0, 3], [0, 5, 3, 5], [0, 7, 5, 7], [1, 8, 6, 8], [3, 8, 6, 8], [4, 8, 7, 8]];
        assert_eq!(all, expected);
        for first in 1..12 {
            for (total, len, stride) in [(1, 4, 4), (9, 4, 3), (30, 10, 4), (30, 10, 10)] {
                let windows = Windows::each_once_after(first, total, len, stride).unwrap();
                assert_eq!(times_scored(&windows, total), vec![1; total], "{first} {total} {len} {stride}");
                assert_eq!(windows[0].targets(), 0..first.min(len).min(total));
                // All the context that there is.
                assert!(windows.iter().all(|w| w.len == len || w.start == 0));
            }
        }
        assert!(Windows::each_once_after(3, 12, 8, 9).is_err());
    }

    #[test]
    fn pr1382_cuts_the_last_windows_short_and_scores_the_tail_again() {
        let windows = Windows::Pr1382.list(11, 4, 2).unwrap();
        let all: Vec<[usize; 4]> = windows.iter().map(|w| [w.start, w.len, w.from, w.to]).collect();
        let expected = [[0, 4, 0, 4], [2, 4, 2, 4], [4, 4, 2, 4], [6, 4, 2, 4], [8, 3, 1, 3], [10, 1, 0, 1]];
        assert_eq!(all, expected);
        assert_eq!(times_scored(&windows, 11), [1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2][..]);
        // For training the start with one target left is dropped; the window before has scored that target.
        let training = Windows::pr1382_training(11, 4, 2).unwrap();
        assert_eq!(starts(&training), [0, 2, 4, 6, 8]);
        assert_eq!(times_scored(&training, 11), [1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 1][..]);
    }

    #[test]
    fn pr1607_adds_a_window_that_ends_with_the_last_target() {
        let windows = Windows::Pr1607.list(11, 4, 3).unwrap();
        assert_eq!(starts(&windows), [0, 3, 6, 7]);
        assert!(windows[1..].iter().all(|window| (window.len, window.from, window.to) == (4, 1, 4)));
        assert_eq!(times_scored(&windows, 11), [1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 1][..]);
        assert_eq!(starts(&Windows::Pr1607.list(10, 4, 3).unwrap()), [0, 3, 6]);
        assert_eq!(starts(&Windows::Pr1607.list(4, 4, 3).unwrap()), [0]);
    }

    #[test]
    fn every_kind_scores_every_target_and_nothing_else() {
        for windows in Windows::ALL {
            for (total, len, stride) in [(70, 12, 5), (60, 12, 4), (61, 12, 12), (13, 12, 1), (12, 12, 7)] {
                let list = windows.list(total, len, stride).unwrap();
                let times = times_scored(&list, total);
                assert!(times.iter().all(|times| *times > 0), "{windows} {total} {len} {stride}: {times:?}");
            }
        }
    }

    #[test]
    fn strides_and_names_that_make_no_sense_are_refused() {
        for windows in Windows::ALL {
            assert_eq!(windows.to_string().parse::<Windows>().unwrap(), windows);
            assert!(windows.list(10, 4, 0).is_err() && windows.list(10, 4, 5).is_err());
            assert!(windows.list(0, 4, 2).is_err());
        }
        assert!(Windows::Pr1607.list(3, 4, 2).is_err());
        assert_eq!(Windows::EachOnce.list(3, 4, 2).unwrap().len(), 1);
        let error = "sideways".parse::<Windows>().unwrap_err().to_string();
        assert_eq!(error, "windows sideways, --windows, expected one of each-once, pr1382, pr1607");
    }
}
