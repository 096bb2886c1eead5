//! `curve.svg`: training loss (left axis) and validation bits per byte (right axis) over the steps of a run.

use crate::error::{Error, Result};
use plotters::coord::Shift;
use plotters::prelude::*;
use std::ops::Range;
use std::path::Path;

/// One step of a run; a value that is absent or not finite leaves a gap.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Point {
    /// Completed optimizer steps.
    pub step: usize,
    /// Training loss in nats per token.
    pub train_loss: Option<f64>,
    /// Validation bits per byte.
    pub val_bpb: Option<f64>,
}

const SIZE: (u32, u32) = (900, 500);
/// Blue and vermilion that stay apart for colour-blind readers (Okabe and Ito).
const TRAIN: RGBColor = RGBColor(0, 114, 178);
const VALIDATION: RGBColor = RGBColor(213, 94, 0);
/// More points than this on one line cannot be told apart on 900 pixels.
const MOST_POINTS: usize = 4000;

type Runs = Vec<Vec<(f64, f64)>>;

/// Beyond these a step or a value is no more drawable than infinity: their differences lose the axis' digits.
const FARTHEST: f64 = 1e9;

/// The drawable values in order of steps, cut into runs at the gaps and thinned to what can be seen.
fn runs(points: &[Point], value: impl Fn(&Point) -> Option<f64>) -> Runs {
    let drawable = |v: f64| if v.abs() <= FARTHEST { v } else { f64::NAN };
    let mut present: Vec<_> = points
        .iter()
        .filter(|p| p.step as f64 <= FARTHEST)
        .filter_map(|p| value(p).map(|v| (p.step as f64, drawable(v))))
        .collect();
    present.sort_by(|a, b| a.0.total_cmp(&b.0));
    let stride = present.len().div_ceil(MOST_POINTS).max(1);
    let last = present.len().saturating_sub(1);
    let thinned =
        present.iter().enumerate().filter(|(i, (_, v))| i % stride == 0 || *i == last || !v.is_finite());
    let mut runs: Runs = vec![Vec::new()];
    for (_, &(step, v)) in thinned {
        match runs.last_mut() {
            Some(run) if v.is_finite() => run.push((step, v)),
            Some(run) if run.is_empty() => {}
            _ => runs.push(Vec::new()),
        }
    }
    runs.retain(|run| !run.is_empty());
    runs
}

/// The value range of a line with a little air, never empty.
fn range(runs: &Runs) -> Range<f64> {
    let values = || runs.iter().flatten().map(|(_, v)| *v);
    let (low, high) = (values().fold(f64::MAX, f64::min), values().fold(f64::MIN, f64::max));
    if low > high {
        return 0.0..1.0;
    }
    let air = ((high - low) * 0.05).max(high.abs() * 0.01).max(1e-3);
    low - air..high + air
}

/// The label of an axis value: more digits on a narrow range, none on an axis without values.
fn value_label(runs: &Runs) -> impl Fn(&f64) -> String {
    let Range { start, end } = range(runs);
    let decimals = if end - start < 0.5 { 3 } else { 2 };
    let empty = runs.is_empty();
    move |value| if empty { String::new() } else { format!("{value:.decimals$}") }
}

/// The label of a step; ticks between whole steps, on a short axis, get none.
fn step_label(step: &f64) -> String {
    if step.fract() == 0.0 { format!("{step:.0}") } else { String::new() }
}

/// The height at which a short spike above the first loss is cut, so that it does not flatten the rest of the curve.
///
/// The baseline's second step has a loss of 17 where a run starts at 7 and ends at 2. `None` when nothing is far above
/// the start, or when more than a twentieth of the steps are: then the loss really is that high.
fn spike_cut(runs: &Runs) -> Option<f64> {
    let points: Vec<_> = runs.iter().flatten().collect();
    let (first, last) = (points.first()?, points.last()?);
    let cut = first.1 * 1.15;
    let above: f64 = points.windows(2).filter(|pair| pair[1].1 > cut).map(|pair| pair[1].0 - pair[0].0).sum();
    (above > 0.0 && above <= (last.0 - first.0) * 0.05).then_some(cut)
}

/// Draws the curve into `path`, whole or not at all. Any number of points will do, none included.
///
/// Errors: the file cannot be written.
pub fn draw(points: &[Point], path: &Path, title: &str) -> Result<()> {
    let mut svg = String::new();
    let title: String = title.chars().filter(|c| !c.is_control()).take(100).collect();
    let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
    let drawn = chart(&area, points, &title).map_err(|error| error.to_string());
    drop(area);
    drawn.map_err(|error| Error::failed(format!("cannot draw ({error})"), path.display(), "a curve"))?;
    crate::files::write_atomic(path, svg.as_bytes())
}

fn chart<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    points: &[Point],
    title: &str,
) -> std::result::Result<(), DrawingAreaErrorKind<B::ErrorType>> {
    let mut train = runs(points, |p| p.train_loss);
    let val = runs(points, |p| p.val_bpb);
    let steps = || train.iter().chain(&val).flatten().map(|(step, _)| *step);
    let (first, last) = (steps().fold(f64::MAX, f64::min), steps().fold(0.0, f64::max));
    let x_range = if first < last { first..last } else { (last - 1.0).max(0.0)..last + 1.0 };

    let cut = spike_cut(&train);
    if let Some(cut) = cut {
        train.iter_mut().flatten().for_each(|(_, v)| *v = v.min(cut));
    }
    let loss_label = match cut {
        Some(cut) => format!("train loss (nats per token, cut at {cut:.2})"),
        None => "train loss (nats per token)".into(),
    };

    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(42)
        .y_label_area_size(58)
        .right_y_label_area_size(58)
        .build_cartesian_2d(x_range.clone(), range(&train))?
        .set_secondary_coord(x_range, range(&val));
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(RGBColor(225, 225, 225))
        .x_desc("step")
        .y_desc(loss_label)
        .x_labels(10)
        .y_labels(8)
        .x_label_formatter(&step_label)
        .y_label_formatter(&value_label(&train))
        .label_style(("sans-serif", 13))
        .axis_desc_style(("sans-serif", 14))
        .draw()?;
    chart
        .configure_secondary_axes()
        .y_desc("validation bits per byte")
        .y_labels(8)
        .y_label_formatter(&value_label(&val))
        .label_style(("sans-serif", 13))
        .axis_desc_style(("sans-serif", 14))
        .draw()?;

    let key =
        |color: RGBColor| move |(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], color.stroke_width(2));
    for (i, run) in train.iter().enumerate() {
        let series = chart.draw_series(LineSeries::new(run.iter().copied(), TRAIN.stroke_width(1)))?;
        if i == 0 {
            series.label("train loss").legend(key(TRAIN));
        }
        // A run of one point has no line to show.
        if let [point] = run[..] {
            chart.draw_series([Circle::new(point, 3, TRAIN.filled())])?;
        }
    }
    for (i, run) in val.iter().enumerate() {
        let line = LineSeries::new(run.iter().copied(), VALIDATION.stroke_width(2));
        let series = chart.draw_secondary_series(line)?;
        if i == 0 {
            series.label("validation bits per byte").legend(key(VALIDATION));
        }
        chart.draw_secondary_series(run.iter().map(|&point| Circle::new(point, 3, VALIDATION.filled())))?;
    }
    if train.is_empty() && val.is_empty() {
        let middle = (SIZE.0 as i32 / 2 - 40, SIZE.1 as i32 / 2);
        area.draw(&plotters::element::Text::new("no points yet", middle, ("sans-serif", 16)))?;
    } else {
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.85))
            .border_style(RGBColor(200, 200, 200))
            .label_font(("sans-serif", 14))
            .draw()?;
    }
    area.present()
}
