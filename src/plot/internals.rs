//! A run's layers against steps: what their weights, inputs and gradients are like, a line for each.

use std::ops::Range;
use std::path::Path;

use plotters::prelude::*;
use plotters::style::FontStyle;
use plotters::style::text_anchor::HPos;

use super::{
    Area, Drawn, INK, MARGIN, MUTED, PlotError, Points, Run, WIDTH, canvas, finite, label, line, panel, range,
    scientific, text, units, write_png,
};
use crate::training::metrics::{InternalsRow, LayerRow, Row};

/// Height of a panel in points; the last has the axis of steps besides.
const PANEL: i32 = 190;
const STEPS: i32 = 46;
/// Where the panels begin, in points.
const TOP: i32 = 62;

/// The colours of the first layer and the last, and of two between: the darker part of viridis (van der Walt and Smith
/// 2015), which rises evenly in lightness for the colour-blind as well.
const RAMP: [(f64, f64, f64); 4] = [(68.0, 1.0, 84.0), (59.0, 82.0, 139.0), (33.0, 145.0, 140.0), (94.0, 201.0, 98.0)];

/// The colour of a layer at `depth`, 0 to 1 from the first to the last.
fn ramp(depth: f64) -> RGBColor {
    let place = depth.clamp(0.0, 1.0) * (RAMP.len() - 1) as f64;
    let index = (place as usize).min(RAMP.len() - 2);
    let (a, b, t) = (RAMP[index], RAMP[index + 1], place - index as f64);
    let mix = |a: f64, b: f64| (a + t * (b - a)).round() as u8;
    RGBColor(mix(a.0, b.0), mix(a.1, b.1), mix(a.2, b.2))
}

/// What a panel shows of a layer.
struct Panel {
    caption: &'static str,
    value: fn(&LayerRow) -> Option<f64>,
    /// Whether its values are drawn by their logarithm: layers and times differ by factors.
    logarithmic: bool,
}

const PANELS: [Panel; 5] = [
    Panel { caption: "Weights at 0, fraction", value: |layer| layer.zero, logarithmic: false },
    Panel { caption: "Weights changed since the last look, fraction", value: |layer| layer.flips, logarithmic: true },
    Panel { caption: "Gamma: mean absolute weight", value: |layer| layer.gamma, logarithmic: false },
    Panel { caption: "Gradient norm before clipping", value: |layer| Some(layer.grad_norm), logarithmic: true },
    Panel { caption: "Largest absolute input", value: |layer| layer.input_absmax, logarithmic: true },
];

impl Panel {
    /// The curve of the layer called `name`; what is missing, or has no logarithm, is a gap.
    fn curve(&self, rows: &[&InternalsRow], name: &str) -> Points {
        let point = |row: &&InternalsRow| {
            let value = row.layers.iter().find(|layer| layer.name == name).and_then(self.value).unwrap_or(f64::NAN);
            (row.step as f64, if self.logarithmic { value.log10() } else { value })
        };
        rows.iter().map(point).collect()
    }
}

/// Draws the looks inside of `run` as a PNG at `out`, which is replaced in one go.
///
/// # Errors
/// [`PlotError`]; the file at `out` is then as it was.
pub fn plot_internals(run: &Run, out: &Path) -> Result<(), PlotError> {
    let rows: Vec<&InternalsRow> = run
        .rows
        .iter()
        .filter_map(|row| match row {
            Row::Internals(row) => Some(row),
            _ => None,
        })
        .collect();
    let Some(layers) = rows.last().map(|row| &row.layers).filter(|layers| !layers.is_empty()) else {
        return Err(PlotError::NoInternals(run.name.clone()));
    };
    let names: Vec<&str> = layers.iter().map(|layer| layer.name.as_str()).collect();
    let height = TOP + PANEL * PANELS.len() as i32 + STEPS;
    write_png(out, || canvas(height, |root| draw(root, &run.name, &rows, &names)))
}

fn draw(root: &Area, run: &str, rows: &[&InternalsRow], names: &[&str]) -> Drawn<()> {
    root.fill(&WHITE)?;
    let title = format!("Inside {}", label(run));
    root.draw(&Text::new(title, (units(MARGIN), units(20)), text(22, FontStyle::Bold, INK, HPos::Left)))?;
    legend(root, names)?;
    let (_, mut rest) = root.split_vertically(units(TOP));
    let steps = 0.0..rows.last().map_or(1.0, |row| row.step as f64).max(1.0);
    for (index, panel) in PANELS.iter().enumerate() {
        let is_last = index + 1 == PANELS.len();
        let (own, below) = rest.split_vertically(units(if is_last { PANEL + STEPS } else { PANEL }));
        draw_panel(&own, panel, rows, names, steps.clone(), is_last)?;
        rest = below;
    }
    Ok(())
}

fn draw_panel(
    area: &Area,
    shown: &Panel,
    rows: &[&InternalsRow],
    names: &[&str],
    steps: Range<f64>,
    with_steps: bool,
) -> Drawn<()> {
    let curves: Vec<Points> = names.iter().map(|name| shown.curve(rows, name)).collect();
    let values = range(finite(curves.iter().flatten()).map(|(_, value)| value));
    let (top, plain): (f64, &dyn Fn(&f64) -> String) = (values.end, &significant);
    let power = |exponent: &f64| significant(&10f64.powf(*exponent));
    let y_label = if shown.logarithmic { &power } else { plain };
    let mut chart = panel(area, shown.caption, steps, values, y_label, with_steps)?;
    for (curve, depth) in curves.iter().zip(0..) {
        line(&mut chart, curve, top, ramp(depth_of(depth, names)).mix(1.0), 1)?;
    }
    Ok(())
}

fn depth_of(index: usize, names: &[&str]) -> f64 {
    index as f64 / (names.len().max(2) - 1) as f64
}

/// The ramp between the names of the first layer and the last, flush right.
fn legend(root: &Area, names: &[&str]) -> Drawn<()> {
    const BAR: i32 = 160;
    let (y, half) = (units(20), units(5));
    let style = text(13, FontStyle::Normal, MUTED, HPos::Right);
    let width = |name: &str| style.font.layout_box(name).map(|((left, _), (right, _))| right - left);
    let [first, last] = [names.first(), names.last()].map(|name| label(name.unwrap_or(&"")));
    let end = units(WIDTH - MARGIN);
    let bar_end = end - width(&last)? - units(8);
    let bar = bar_end - units(BAR);
    root.draw(&Text::new(last, (end, y), style.clone()))?;
    root.draw(&Text::new(first, (bar - units(8), y), style.clone()))?;
    for point in 0..BAR {
        let color = ramp(f64::from(point) / f64::from(BAR - 1));
        let x = bar + units(point);
        root.draw(&Rectangle::new([(x, y - half), (x + units(1), y + half)], color.filled()))?;
    }
    Ok(())
}

/// A number with three digits.
fn significant(value: &f64) -> String {
    if *value != 0.0 && !(1e-3..1e5).contains(&value.abs()) {
        return scientific(value);
    }
    // As short as that number is.
    format!("{value:.2e}").parse().map_or_else(|_| String::new(), |value: f64| value.to_string())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{count, pixels_of};
    use super::*;

    /// A run of `blocks` blocks, whose numbers differ from layer to layer and change from look to look.
    fn run(blocks: usize, looks: u64) -> Run {
        let layer = |index: usize, step: u64| {
            let (depth, time) = (index as f64 / blocks as f64, step as f64 / 100.0 + 1.0);
            LayerRow {
                name: format!("blocks.{index}.attn.q_proj"),
                grad_norm: (1.0 + depth) / time,
                zero: Some(0.3 + 0.1 * depth + 0.01 * time),
                plus: Some(0.3),
                minus: Some(0.3),
                flips: (step > 0).then_some(0.1 * (1.0 + depth) / time),
                gamma: Some(0.02 + 0.01 * depth + 0.001 * time),
                input_absmax: Some(5.0 * (1.0 + depth) * time),
                input_absmax_mean: Some(3.0),
            }
        };
        let embedding = LayerRow { name: "tok_emb".into(), grad_norm: 0.5, ..LayerRow::default() };
        let row = |look| {
            let layers = (0..blocks).map(|index| layer(index, 100 * look));
            Row::Internals(InternalsRow {
                step: 100 * look,
                layers: [embedding.clone()].into_iter().chain(layers).collect(),
            })
        };
        Run { name: "tiny".into(), rows: (0..looks).map(row).collect() }
    }

    #[test]
    fn every_panel_has_a_line_for_each_layer() {
        for blocks in [2, 24] {
            let pixels = pixels_of(|out| plot_internals(&run(blocks, 30), out));
            assert_eq!((pixels.width(), pixels.height()), (2000, 2 * (TOP + 5 * PANEL + STEPS) as u32));
            for panel in 0..5 {
                let rows = 2 * (TOP + panel * PANEL) as u32..2 * (TOP + (panel + 1) * PANEL) as u32;
                for index in [1, blocks / 2, blocks] {
                    let color = ramp(index as f64 / blocks as f64);
                    let found = rows.clone().flat_map(|y| (0..2000).map(move |x| (x, y))).filter(|&(x, y)| {
                        pixels
                            .pixel(x, y)
                            .is_some_and(|p| (p.red(), p.green(), p.blue()) == (color.0, color.1, color.2))
                    });
                    assert!(found.count() > 200, "{blocks} blocks, panel {panel}, layer {index}");
                }
            }
            assert!(count(&pixels, INK) > 300);
        }
    }

    #[test]
    fn one_look_and_gaps_are_drawn() {
        let pixels = pixels_of(|out| plot_internals(&run(3, 1), out));
        assert!(count(&pixels, ramp(1.0)) > 50);
        let mut gaps = run(3, 9);
        if let Row::Internals(row) = &mut gaps.rows[4] {
            row.layers[1].grad_norm = f64::NAN;
            row.layers[2].flips = Some(0.0);
            row.layers.truncate(3);
        }
        assert!(count(&pixels_of(|out| plot_internals(&gaps, out)), ramp(1.0)) > 200);
    }

    #[test]
    fn a_run_that_was_not_looked_into_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("plot.png");
        let message = plot_internals(&Run { name: "dark".into(), rows: vec![] }, &out).unwrap_err().to_string();
        assert!(message.contains("\"dark\"") && message.contains("train.internals_every"), "{message}");
        assert!(!out.exists());
    }

    #[test]
    fn the_ramp_and_the_labels() {
        assert_eq!((ramp(0.0), ramp(1.0)), (RGBColor(68, 1, 84), RGBColor(94, 201, 98)));
        let lightness = |c: RGBColor| 0.3 * f64::from(c.0) + 0.6 * f64::from(c.1) + 0.1 * f64::from(c.2);
        let rises = |i: u32| lightness(ramp(f64::from(i) / 20.0)) < lightness(ramp(f64::from(i + 1) / 20.0));
        assert!((0..20).all(rises));
        let labels = [0.0, 0.0225, 31.62277, 0.5, 1e-4, -0.1, 250.0].map(|value| significant(&value));
        assert_eq!(labels, ["0", "0.0225", "31.6", "0.5", "1e-4", "-0.1", "250"]);
    }
}
