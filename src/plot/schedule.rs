//! A picture of what a configuration plans, before any training: what a run does at each of its steps.

use std::path::Path;

use plotters::prelude::*;
use plotters::style::FontStyle;
use plotters::style::text_anchor::HPos;

use super::{
    Area, COLORS, Drawn, INK, MARGIN, MUTED, PlotError, Points, WIDTH, canvas, label, line, panel, scientific, text,
    thousands, trimmed, units, write_png,
};
use crate::config::Config;
use crate::training::lr_scheduler::{lr_for_step, seq_len_for_step, weight_decay_for_step};

/// Height of the title, of a panel, and of the axis below the last, in points.
const TITLE: i32 = 48;
const PANEL: i32 = 190;
const AXIS: i32 = 46;
/// As many steps are drawn of a long run: two for each pixel.
const DRAWN: u64 = 4000;

/// What is drawn of one quantity.
struct Plan {
    caption: &'static str,
    number: fn(&f64) -> String,
    values: Points,
}

/// Draws the learning rate, weight decay and sequence length that `config` plans for each step, and how far
/// quantization has come in where it does so gradually, as a PNG at `out`, which is replaced in one go. `name` is what
/// the title calls the configuration, such as that of its file.
///
/// # Errors
/// [`PlotError`]; the file at `out` is then as it was.
pub fn plot_schedule(config: &Config, name: &str, out: &Path) -> Result<(), PlotError> {
    write_png(out, || {
        let plans = plans(config);
        let title = format!("Schedule of {}", label(name));
        canvas(TITLE + PANEL * plans.len() as i32 + AXIS, |root| draw(root, &title, config.train.steps, &plans))
    })
}

fn plans(config: &Config) -> Vec<Plan> {
    let (steps, optim, curriculum) = (config.train.steps, &config.optim, config.data.curriculum());
    let plan = |caption, number, value: &dyn Fn(u64) -> f64| {
        let count = steps.min(DRAWN);
        // Each step of a short run; the first and the last of a long one.
        let drawn = (0..count).map(|i| u128::from(i) * u128::from(steps - 1) / u128::from(count.max(2) - 1));
        Plan { caption, number, values: drawn.map(|step| (step as f64, value(step as u64))).collect() }
    };
    let mut plans = vec![
        plan("Learning rate", scientific, &|step| lr_for_step(step, steps, optim)),
        plan("Weight decay", trimmed, &|step| weight_decay_for_step(step, steps, optim)),
        plan("Sequence length", thousands, &|step| seq_len_for_step(step, steps, &curriculum) as f64),
    ];
    if config.quant.start_frac > 0.0 {
        plans.push(plan("Quantization", trimmed, &|step| config.quant.lambda(step, steps)));
    }
    plans
}

fn draw(root: &Area, title: &str, steps: u64, plans: &[Plan]) -> Drawn<()> {
    root.draw(&Text::new(title, (units(MARGIN), units(20)), text(22, FontStyle::Bold, INK, HPos::Left)))?;
    let total = format!("{} steps", thousands(&(steps as f64)));
    root.draw(&Text::new(total, (units(WIDTH - MARGIN), units(20)), text(13, FontStyle::Normal, MUTED, HPos::Right)))?;
    let (_, mut rest) = root.split_vertically(units(TITLE));
    for (index, plan) in plans.iter().enumerate() {
        let is_last = index + 1 == plans.len();
        let (area, below) = rest.split_vertically(units(if is_last { PANEL + AXIS } else { PANEL }));
        rest = below;
        let highest = plan.values.iter().fold(0.0, |highest, &(_, value)| value.max(highest));
        let y = 0.0..if highest > 0.0 { 1.08 * highest } else { 1.0 };
        let (top, x) = (y.end, 0.0..(steps - 1).max(1) as f64);
        let mut chart = panel(&area, plan.caption, x, y, &plan.number, is_last)?;
        line(&mut chart, &plan.values, top, COLORS[index].mix(1.0), 2)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Schedule;
    use resvg::tiny_skia::Pixmap;

    fn picture(config: &Config) -> Pixmap {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("schedule.png");
        plot_schedule(config, "test.yaml", &out).unwrap();
        Pixmap::load_png(&out).unwrap()
    }

    /// The curve of a colour, read off the pixels: where it lies, 0 to 1 from left to right and from its lowest to its
    /// highest, with its height in pixels.
    fn curve(pixels: &Pixmap, RGBColor(r, g, b): RGBColor) -> (Vec<(f64, f64)>, f64) {
        let width = pixels.width();
        let mut columns = std::collections::BTreeMap::<u32, Vec<u32>>::new();
        for (index, pixel) in (0..).zip(pixels.pixels()) {
            if (pixel.red(), pixel.green(), pixel.blue()) == (r, g, b) {
                columns.entry(index % width).or_default().push(index / width);
            }
        }
        let middles: Vec<(f64, f64)> = columns
            .iter()
            .map(|(&x, ys)| (f64::from(x), ys.iter().map(|&y| f64::from(y)).sum::<f64>() / ys.len() as f64))
            .collect();
        let (left, right) = (middles[0].0, middles[middles.len() - 1].0);
        let top = middles.iter().fold(f64::MAX, |top, &(_, y)| top.min(y));
        let bottom = middles.iter().fold(0.0, |bottom: f64, &(_, y)| bottom.max(y));
        let height = bottom - top;
        (middles.iter().map(|(x, y)| ((x - left) / (right - left), (bottom - y) / height.max(1.0))).collect(), height)
    }

    /// Whether the curve of a colour is that of `value` over the steps, as its lowest and highest are 0 and 1.
    fn shows(pixels: &Pixmap, color: RGBColor, steps: u64, value: impl Fn(u64) -> f64) {
        let (curve, height) = curve(pixels, color);
        let values: Vec<f64> = (0..steps).map(&value).collect();
        let low = values.iter().copied().fold(f64::MAX, f64::min);
        let high = values.iter().copied().fold(f64::MIN, f64::max);
        if high == low {
            assert!(height <= 1.0, "a constant: {height}");
            return;
        }
        assert!(curve.len() > 1000 && height > 100.0, "{} {height}", curve.len());
        for (x, y) in curve {
            let at = x * (steps - 1) as f64;
            // A few pixels to each side, and the next step: a drop is steep.
            let near = |reach: f64| values[((at + reach).max(0.0) as usize).min(values.len() - 1)];
            let pixels = (steps as f64 / 1800.0).max(0.35);
            let near: Vec<f64> = (-4..=4).map(|i| near(f64::from(i) * pixels)).collect();
            let (least, most) =
                (near.iter().copied().fold(f64::MAX, f64::min), near.iter().copied().fold(f64::MIN, f64::max));
            let y = low + y * (high - low);
            let margin = 0.03 * (high - low);
            assert!(y > least - margin && y < most + margin, "{color:?} at {x}: {y}, not {least} to {most}");
        }
    }

    #[test]
    fn each_curve_is_that_of_the_configuration() {
        for schedule in [Schedule::Cosine, Schedule::Constant, Schedule::Wsd, Schedule::TwoStage] {
            for steps in [300, 100_000] {
                let mut config = Config::default();
                config.train.steps = steps;
                (config.optim.schedule, config.optim.warmup_frac) = (schedule, 0.1);
                (config.quant.start_frac, config.data.seq_len) = (0.4, None);
                config.data.curriculum = Some(vec![(0.0, 512), (0.25, 1024), (0.75, 4096)]);
                let pixels = picture(&config);
                let (optim, curriculum) = (&config.optim, config.data.curriculum());
                shows(&pixels, COLORS[0], steps, |step| lr_for_step(step, steps, optim));
                shows(&pixels, COLORS[1], steps, |step| weight_decay_for_step(step, steps, optim));
                shows(&pixels, COLORS[2], steps, |step| seq_len_for_step(step, steps, &curriculum) as f64);
                shows(&pixels, COLORS[3], steps, |step| config.quant.lambda(step, steps));
            }
        }
    }

    #[test]
    fn quantization_has_a_panel_only_where_it_comes_in() {
        let mut config = Config::default();
        let pixels = picture(&config);
        let RGBColor(r, g, b) = COLORS[3];
        assert!(!pixels.pixels().iter().any(|pixel| (pixel.red(), pixel.green(), pixel.blue()) == (r, g, b)));
        config.quant.start_frac = 0.1;
        assert!(picture(&config).height() > pixels.height());
    }

    #[test]
    fn the_shortest_run_is_drawn() {
        for steps in 1..=3 {
            let mut config = Config::default();
            config.train.steps = steps;
            let pixels = picture(&config);
            let RGBColor(r, g, b) = COLORS[0];
            let drawn = pixels.pixels().iter().filter(|pixel| (pixel.red(), pixel.green(), pixel.blue()) == (r, g, b));
            assert!(drawn.count() > 10, "{steps}");
        }
    }
}
