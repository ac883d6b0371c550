//! A run from inside, against steps: what its layers' weights, inputs and gradients are like, a line for each layer, and
//! below them what concerns all of it.

use std::ops::Range;
use std::path::Path;

use plotters::prelude::*;
use plotters::style::FontStyle;
use plotters::style::text_anchor::HPos;

use super::{
    Area, Drawn, INK, MARGIN, MUTED, PlotError, Points, Run, WIDTH, canvas, finite, label, line, panel, range,
    scientific, text, units, write_png,
};
use crate::training::metrics::{InternalsRow, LayerRow, Row, TrainRow};

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

/// What a panel shows of a layer, or of a step.
struct Shown<T> {
    caption: &'static str,
    value: fn(&T) -> Option<f64>,
    /// Whether its values are drawn by their logarithm: layers and times differ by factors.
    logarithmic: bool,
}

const OF_LAYERS: [Shown<LayerRow>; 7] = [
    Shown { caption: "Weights at 0, fraction", value: |layer| layer.zero, logarithmic: false },
    Shown { caption: "Weights at +1, fraction", value: |layer| layer.plus, logarithmic: false },
    Shown { caption: "Weights at -1, fraction", value: |layer| layer.minus, logarithmic: false },
    Shown { caption: "Weights changed since the last look, fraction", value: |layer| layer.flips, logarithmic: true },
    Shown { caption: "Gamma: mean absolute weight", value: |layer| layer.gamma, logarithmic: false },
    Shown { caption: "Gradient norm before clipping", value: |layer| Some(layer.grad_norm), logarithmic: true },
    Shown { caption: "Largest absolute input", value: |layer| layer.input_absmax, logarithmic: true },
];

const OF_STEPS: [Shown<TrainRow>; 4] = [
    Shown {
        caption: "Steps skipped, so far",
        value: |row| (row.skipped_steps > 0).then_some(row.skipped_steps as f64),
        logarithmic: false,
    },
    Shown { caption: "Loss scale", value: |row| row.loss_scale, logarithmic: true },
    Shown { caption: "Model FLOPs utilisation", value: |row| row.mfu, logarithmic: false },
    Shown {
        caption: "Peak memory, GiB",
        value: |row| Some(row.peak_memory_bytes as f64 / f64::from(1 << 30)),
        logarithmic: false,
    },
];

impl<T> Shown<T> {
    /// What to draw of `value`, of which there may be none; what is missing, or has no logarithm, is a gap.
    fn height(&self, value: Option<&T>) -> f64 {
        let value = value.and_then(self.value).unwrap_or(f64::NAN);
        if self.logarithmic { value.log10() } else { value }
    }
}

/// A panel with its curves.
struct Panel {
    caption: &'static str,
    logarithmic: bool,
    curves: Vec<(Points, RGBColor)>,
}

impl Panel {
    fn of_layers(shown: &Shown<LayerRow>, rows: &[&InternalsRow], names: &[&str]) -> Self {
        let curve = |(index, name): (usize, &&str)| {
            let point = |row: &&InternalsRow| {
                (row.step as f64, shown.height(row.layers.iter().find(|layer| layer.name == **name)))
            };
            (rows.iter().map(point).collect(), ramp(depth_of(index, names)))
        };
        let curves = names.iter().enumerate().map(curve).collect();
        Self { caption: shown.caption, logarithmic: shown.logarithmic, curves }
    }

    /// None where there is nothing to show: no step was skipped, a loss scale is fp16's, a utilisation that of a device
    /// whose peak is known.
    fn of_steps(shown: &Shown<TrainRow>, rows: &[&TrainRow]) -> Option<Self> {
        let curve: Points = rows.iter().map(|row| (row.step as f64, shown.height(Some(row)))).collect();
        let any = finite(curve.iter()).next().is_some();
        let curves = vec![(curve, INK)];
        any.then_some(Self { caption: shown.caption, logarithmic: shown.logarithmic, curves })
    }
}

/// Draws the looks inside of `run` as a PNG at `out`, which is replaced in one go.
///
/// # Errors
/// [`PlotError`]; the file at `out` is then as it was.
pub fn plot_internals(run: &Run, out: &Path) -> Result<(), PlotError> {
    let (mut looks, mut steps) = (vec![], vec![]);
    for row in &run.rows {
        match row {
            Row::Internals(row) => looks.push(row),
            Row::Train(row) => steps.push(row),
            Row::Val(_) => {}
        }
    }
    let Some(layers) = looks.last().map(|row| &row.layers).filter(|layers| !layers.is_empty()) else {
        return Err(PlotError::NoInternals(run.name.clone()));
    };
    let names: Vec<&str> = layers.iter().map(|layer| layer.name.as_str()).collect();
    let of_layers = OF_LAYERS.iter().map(|shown| Panel::of_layers(shown, &looks, &names));
    let panels: Vec<Panel> =
        of_layers.chain(OF_STEPS.iter().filter_map(|shown| Panel::of_steps(shown, &steps))).collect();
    let last = run.rows.iter().map(Row::step).max().unwrap_or(0);
    let height = TOP + PANEL * panels.len() as i32 + STEPS;
    write_png(out, || canvas(height, |root| draw(root, &run.name, &panels, &names, 0.0..(last as f64).max(1.0))))
}

fn draw(root: &Area, run: &str, panels: &[Panel], names: &[&str], steps: Range<f64>) -> Drawn<()> {
    root.fill(&WHITE)?;
    let title = format!("Inside {}", label(run));
    root.draw(&Text::new(title, (units(MARGIN), units(20)), text(22, FontStyle::Bold, INK, HPos::Left)))?;
    legend(root, names)?;
    let (_, mut rest) = root.split_vertically(units(TOP));
    for (index, panel) in panels.iter().enumerate() {
        let is_last = index + 1 == panels.len();
        let (own, below) = rest.split_vertically(units(if is_last { PANEL + STEPS } else { PANEL }));
        draw_panel(&own, panel, steps.clone(), is_last)?;
        rest = below;
    }
    Ok(())
}

fn draw_panel(area: &Area, shown: &Panel, steps: Range<f64>, with_steps: bool) -> Drawn<()> {
    let values = range(finite(shown.curves.iter().flat_map(|(curve, _)| curve)).map(|(_, value)| value));
    let (top, plain): (f64, &dyn Fn(&f64) -> String) = (values.end, &significant);
    let power = |exponent: &f64| significant(&10f64.powf(*exponent));
    let y_label = if shown.logarithmic { &power } else { plain };
    let mut chart = panel(area, shown.caption, steps, values, y_label, with_steps)?;
    for (curve, color) in &shown.curves {
        line(&mut chart, curve, top, color.mix(1.0), 1)?;
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
    use super::super::tests::{count, pixels_of, train_row};
    use super::*;

    /// A run of `blocks` blocks, whose numbers differ from layer to layer and change from look to look.
    fn run(blocks: usize, looks: u64) -> Run {
        let layer = |index: usize, step: u64| {
            let (depth, time) = (index as f64 / blocks as f64, step as f64 / 100.0 + 1.0);
            LayerRow {
                name: format!("blocks.{index}.attn.q_proj"),
                grad_norm: (1.0 + depth) / time,
                zero: Some(0.3 + 0.1 * depth + 0.01 * time),
                plus: Some(0.3 - 0.1 * depth - 0.01 * time),
                minus: Some(0.3 + 0.05 * depth + 0.01 * time),
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
            assert_eq!((pixels.width(), pixels.height()), (2000, 2 * (TOP + 7 * PANEL + STEPS) as u32));
            for panel in 0..7 {
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
    fn steps_add_the_panels_that_they_have_something_for() {
        let panels = |steps: &[Row]| {
            let mut run = run(2, 3);
            run.rows.extend(steps.iter().cloned());
            let height = pixels_of(|out| plot_internals(&run, out)).height() as i32;
            (height / 2 - TOP - STEPS) / PANEL
        };
        let Row::Train(row) = train_row(10, 2.0, 1e-3) else { panic!("a step") };
        assert_eq!(panels(&[Row::Train(TrainRow { loss_scale: None, mfu: None, ..row.clone() })]), 8);
        let scaled = TrainRow { loss_scale: Some(65536.0), mfu: None, ..row.clone() };
        assert_eq!(panels(&[Row::Train(scaled)]), 9);
        // Each has its line.
        let mut run = run(2, 3);
        let step = |step: u64| {
            let loss_scale = Some(65536.0 / (1 + step) as f64);
            TrainRow {
                step,
                loss_scale,
                mfu: Some(0.3),
                skipped_steps: step,
                peak_memory_bytes: step << 25,
                ..row.clone()
            }
        };
        run.rows.extend((0..200).map(step).map(Row::Train));
        let pixels = pixels_of(|out| plot_internals(&run, out));
        assert_eq!(pixels.height() as i32, 2 * (TOP + 11 * PANEL + STEPS));
        for panel in 7..11 {
            let rows = 2 * (TOP + panel * PANEL) as u32..2 * (TOP + (panel + 1) * PANEL) as u32;
            let ink = rows.flat_map(|y| (200..1900).map(move |x| (x, y))).filter(|&(x, y)| {
                pixels.pixel(x, y).is_some_and(|p| (p.red(), p.green(), p.blue()) == (INK.0, INK.1, INK.2))
            });
            assert!(ink.count() > 1500, "panel {panel}");
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
