//! A picture of one or more runs: bits per byte and learning rate against steps. One of a schedule: `plot/schedule.rs`.
//!
//! `plotters` draws it as SVG, `resvg` turns that into pixels. The font is embedded, so that the
//! picture is the same on every machine, one without fonts included.

mod internals;
mod schedule;

use std::ops::Range;
use std::path::{Path, PathBuf};

use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{FontStyle, register_font};
use resvg::{tiny_skia, usvg};

pub use internals::plot_internals;

use crate::training::metrics::Row;
use crate::utils::atomic::{WriteError, write_bytes};

pub use schedule::plot_schedule;

/// Inter, by The Inter Project Authors, under the SIL Open Font License (`src/plot/OFL.txt`); only its
/// Latin, Greek and Cyrillic letters.
const INTER: &[u8] = include_bytes!("plot/Inter-Regular.otf");
const INTER_SEMIBOLD: &[u8] = include_bytes!("plot/Inter-SemiBold.otf");
const FONT: &str = "Inter";

/// Width in points, about that of a README.
const WIDTH: i32 = 1000;
/// Height of the two panels in points; title and legend come on top.
const PANELS: i32 = 566;
/// Pixels per point in the PNG, for screens of high density.
const PIXELS: f32 = 2.0;
/// Units per point in the SVG, whose coordinates are whole numbers.
const UNITS: i32 = 8;

/// Tells eight runs apart, for the colour-blind as well: after Okabe and Ito, *Color Universal Design*
/// (2008), with black left for the text.
const COLORS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(112, 80, 160),
    RGBColor(140, 100, 70),
];
const INK: RGBColor = RGBColor(31, 35, 40);
const MUTED: RGBColor = RGBColor(101, 109, 118);
const GRID: RGBColor = RGBColor(231, 234, 238);
const AXIS: RGBColor = RGBColor(175, 184, 193);

/// Points left free at the sides.
const MARGIN: i32 = 28;
/// The smoothing reaches this part of a run to each side; runs of fewer logged steps are not smoothed.
const SMOOTHED: usize = 40;

/// The largest part of the values that may lie above the picture: the first steps of a run start at
/// 8 bits per byte and would press all that follows flat.
const CUT: f64 = 0.02;

/// A run to draw.
#[derive(Debug, Clone)]
pub struct Run {
    /// What the legend calls it, such as the name of its directory.
    pub name: String,
    /// Its log, as [`read`](crate::training::metrics::read) gives it.
    pub rows: Vec<Row>,
}

/// A picture that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum PlotError {
    /// The file's name does not end in `.png`.
    #[error("{}: only PNG can be written: choose a name that ends in .png", .0.display())]
    NotPng(PathBuf),
    /// No run was given.
    #[error("no run to draw: name the metrics.jsonl of at least one")]
    NoRuns,
    /// A run has nothing that could be drawn.
    #[error("run {0:?}: its metrics.jsonl holds no finite bits per byte yet: wait for the first logged step")]
    NoRows(String),
    /// A run was never looked into.
    #[error("run {0:?}: its metrics.jsonl holds nothing of its layers: train with train.internals_every above 0")]
    NoInternals(String),
    /// The drawing libraries failed.
    #[error("{}: drawing failed: {message}", path.display())]
    Draw {
        /// The picture.
        path: PathBuf,
        /// What they say.
        message: String,
    },
    /// The picture cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Draws `runs` as a PNG at `out`, which is replaced in one go. Training is drawn as logged (faint)
/// and smoothed (bold), validation as points.
///
/// # Errors
/// [`PlotError`]; the file at `out` is then as it was.
pub fn plot(runs: &[Run], out: &Path) -> Result<(), PlotError> {
    if runs.is_empty() {
        return Err(PlotError::NoRuns);
    }
    let curves: Vec<Curves> = runs.iter().enumerate().map(Curves::new).collect::<Result<_, _>>()?;
    write_png(out, || svg(&curves))
}

/// Writes the picture that `svg` draws.
fn write_png(out: &Path, svg: impl FnOnce() -> Result<String, String>) -> Result<(), PlotError> {
    if !out.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("png")) {
        return Err(PlotError::NotPng(out.into()));
    }
    let png = svg().and_then(|svg| rasterize(&svg));
    let png = png.map_err(|message| PlotError::Draw { path: out.into(), message })?;
    Ok(write_bytes(out, &png)?)
}

type Points = Vec<(f64, f64)>;

/// What is drawn of a run; values that are not finite are gaps.
struct Curves {
    name: String,
    color: RGBColor,
    train: Points,
    smooth: Points,
    val: Points,
    lr: Points,
}

impl Curves {
    fn new((index, run): (usize, &Run)) -> Result<Self, PlotError> {
        let (mut train, mut val, mut lr) = (Points::new(), Points::new(), Points::new());
        for row in &run.rows {
            let step = row.step() as f64;
            match row {
                Row::Train(row) => {
                    train.push((step, row.bits_per_byte));
                    lr.push((step, row.lr));
                }
                Row::Val(row) => val.push((step, row.val_bits_per_byte)),
                Row::Internals(_) => {}
            }
        }
        if finite(train.iter().chain(&val)).next().is_none() {
            return Err(PlotError::NoRows(run.name.clone()));
        }
        let color = COLORS[index % COLORS.len()];
        Ok(Self { name: label(&run.name), color, smooth: smooth(&train), train, val, lr })
    }
}

/// `name` as XML can hold it and the legend has room for.
fn label(name: &str) -> String {
    const LONGEST: usize = 48;
    let name: String = name.chars().filter(|c| !c.is_control()).collect();
    match name.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &name[..end]),
        None => name,
    }
}

fn finite<'a>(points: impl Iterator<Item = &'a (f64, f64)>) -> impl Iterator<Item = (f64, f64)> {
    points.copied().filter(|(_, value)| value.is_finite())
}

/// The mean of each value and its neighbours, one [`SMOOTHED`]th of the run to each side; at the
/// beginning a quarter of the steps so far, so that the mean keeps to the steep fall there.
fn smooth(points: &[(f64, f64)]) -> Points {
    let longest = points.len() / SMOOTHED;
    let mean = |(index, &(step, value)): (usize, &(f64, f64))| {
        if !value.is_finite() {
            return (step, f64::NAN);
        }
        let reach = longest.min(index / 4);
        let near: Vec<f64> =
            finite(points[index - reach..].iter().take(2 * reach + 1)).map(|(_, value)| value).collect();
        (step, near.iter().sum::<f64>() / near.len() as f64)
    };
    points.iter().enumerate().map(mean).collect()
}

/// The parts of a curve that lie at or below `top`, cut where the curve crosses it.
fn below(points: &[(f64, f64)], top: f64) -> Vec<Points> {
    let mut parts = vec![Points::new()];
    let mut previous = (0.0, f64::NAN);
    for &(x, y) in points {
        let (x0, y0) = previous;
        let crosses = y.is_finite() && y0.is_finite() && (y > top) != (y0 > top);
        let crossing = crosses.then(|| (x0 + (x - x0) * (top - y0) / (y - y0), top));
        if let Some(part) = parts.last_mut() {
            part.extend(crossing);
            if y <= top {
                part.push((x, y));
            } else if !part.is_empty() {
                parts.push(Points::new());
            }
        }
        previous = (x, y);
    }
    parts.retain(|part| !part.is_empty());
    parts
}

/// A range around `values` with some room; the highest [`CUT`] of them may lie above.
fn range(values: impl Iterator<Item = f64>) -> Range<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let (Some(&low), Some(&highest)) = (values.first(), values.last()) else { return 0.0..1.0 };
    let high = values[((values.len() - 1) as f64 * (1.0 - CUT)).ceil() as usize];
    // All that there is, where that costs little.
    let high = if highest - low < 1.5 * (high - low) { highest } else { high };
    let room = if high > low { 0.05 * (high - low) } else { (0.05 * high.abs()).max(1e-9) };
    low - room..high + room
}

type Drawn<T> = Result<T, Box<dyn std::error::Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

fn svg(curves: &[Curves]) -> Result<String, String> {
    register_fonts()?;
    let legend = Legend::new(curves)?;
    canvas(legend.bottom / UNITS + PANELS, |root| draw(root, curves, &legend))
}

/// Measures the text; the pixels are resvg's.
fn register_fonts() -> Result<(), String> {
    for (style, font) in [(FontStyle::Normal, INTER), (FontStyle::Bold, INTER_SEMIBOLD)] {
        register_font(FONT, style, font).map_err(|_| "the embedded font is broken".to_owned())?;
    }
    Ok(())
}

/// The SVG, `height` points high, that `draw` draws on white.
fn canvas(height: i32, draw: impl FnOnce(&Area) -> Drawn<()>) -> Result<String, String> {
    register_fonts()?;
    let mut svg = String::new();
    let root = SVGBackend::with_string(&mut svg, (units(WIDTH) as u32, units(height) as u32)).into_drawing_area();
    root.fill(&WHITE).map_err(|error| error.to_string())?;
    draw(&root).map_err(|error| error.to_string())?;
    root.present().map_err(|error| error.to_string())?;
    drop(root);
    // Noisy curves have sharp corners, which would grow spikes.
    Ok(svg.replacen("<svg ", "<svg stroke-linejoin=\"round\" stroke-linecap=\"round\" ", 1))
}

fn draw(root: &Area, curves: &[Curves], legend: &Legend) -> Drawn<()> {
    legend.draw(root, curves)?;
    let (_, panels) = root.split_vertically(legend.bottom);
    let (upper, lower) = panels.split_vertically(units(PANELS) * 63 / 100);
    let points_of = |run: &Curves| [run.train.last().copied(), run.val.last().copied()];
    let steps = 0.0..curves.iter().flat_map(points_of).flatten().fold(1.0, |last, (step, _)| step.max(last));

    let bits = range(curves.iter().flat_map(|run| finite(run.train.iter().chain(&run.val))).map(|(_, value)| value));
    let top = bits.end;
    let mut chart = panel(&upper, "Bits per byte", steps.clone(), bits, &trimmed, false)?;
    for run in curves {
        if run.smooth.len() >= SMOOTHED {
            line(&mut chart, &run.train, top, run.color.mix(0.25), 1)?;
        }
        line(&mut chart, &run.smooth, top, run.color.mix(1.0), 2)?;
    }
    for run in curves {
        line(&mut chart, &run.val, top, run.color.mix(1.0), 1)?;
        let shown: Points = finite(run.val.iter()).filter(|&(_, value)| value <= top).collect();
        // Half-points: many validations get smaller marks.
        let (rim, mark) = if shown.len() <= 50 { (11, 7) } else { (7, 5) };
        for point in shown {
            chart.draw_series([
                Circle::new(point, units(rim) / 2, WHITE.filled()),
                Circle::new(point, units(mark) / 2, run.color.filled()),
            ])?;
        }
    }

    let highest = curves.iter().flat_map(|run| finite(run.lr.iter())).fold(0.0, |highest, (_, lr)| lr.max(highest));
    let rates = 0.0..if highest > 0.0 { 1.08 * highest } else { 1.0 };
    let top = rates.end;
    let mut chart = panel(&lower, "Learning rate", steps, rates, &scientific, true)?;
    for run in curves {
        line(&mut chart, &run.lr, top, run.color.mix(1.0), 2)?;
    }
    Ok(())
}

/// Says which colour is which run, with the last result of each.
struct Legend {
    /// What each run is called, and where that stands, in units.
    entries: Vec<(String, (i32, i32))>,
    /// Where the panels begin, in units.
    bottom: i32,
}

impl Legend {
    /// Width of the line in front of a name, and the room after it.
    const SWATCH: i32 = 22;
    const SPACE: i32 = 8;

    fn style() -> TextStyle<'static> {
        text(14, FontStyle::Normal, INK, HPos::Left)
    }

    /// Sets the names in rows.
    fn new(curves: &[Curves]) -> Result<Self, String> {
        let (mut x, mut y) = (units(MARGIN), units(58));
        let mut entries = Vec::new();
        for run in curves {
            let last = |points: &Points| finite(points.iter()).last();
            let entry = match (last(&run.val), last(&run.smooth)) {
                (Some((_, bits)), _) => format!("{} – validation {bits:.3}", run.name),
                (None, Some((_, bits))) => format!("{} – training {bits:.3}", run.name),
                (None, None) => run.name.clone(),
            };
            let ((left, _), (right, _)) = Self::style().font.layout_box(&entry).map_err(|error| error.to_string())?;
            let width = units(Self::SWATCH + Self::SPACE) + right - left;
            if x > units(MARGIN) && x + width > units(WIDTH - MARGIN) {
                (x, y) = (units(MARGIN), y + units(23));
            }
            entries.push((entry, (x, y)));
            x += width + units(28);
        }
        Ok(Self { entries, bottom: y + units(16) })
    }

    /// Draws title and legend, and says what the kinds of marks mean.
    fn draw(&self, root: &Area, curves: &[Curves]) -> Drawn<()> {
        let title = match curves {
            [_] => "Training run".to_owned(),
            _ => format!("{} training runs", curves.len()),
        };
        root.draw(&Text::new(title, (units(MARGIN), units(20)), text(22, FontStyle::Bold, INK, HPos::Left)))?;
        let is_smooth = curves.iter().any(|run| run.smooth.len() >= SMOOTHED);
        let has_val = curves.iter().any(|run| !run.val.is_empty());
        let marks = match (is_smooth, has_val) {
            (true, true) => "faint: as logged, bold: smoothed, points: validation",
            (true, false) => "faint: as logged, bold: smoothed",
            (false, true) => "line: training, points: validation",
            (false, false) => "",
        };
        let style = text(13, FontStyle::Normal, MUTED, HPos::Right);
        root.draw(&Text::new(marks, (units(WIDTH - MARGIN), units(20)), style))?;
        for ((entry, (x, y)), run) in self.entries.iter().zip(curves) {
            let (x, y, middle) = (*x, *y, x + units(Self::SWATCH) / 2);
            let ends = [(x, y), (x + units(Self::SWATCH), y)];
            root.draw(&PathElement::new(ends, run.color.stroke_width(units(3) as u32)))?;
            root.draw(&Circle::new((middle, y), units(11) / 2, WHITE.filled()))?;
            root.draw(&Circle::new((middle, y), units(7) / 2, run.color.filled()))?;
            root.draw(&Text::new(entry.as_str(), (x + units(Self::SWATCH + Self::SPACE), y), Self::style()))?;
        }
        Ok(())
    }
}

/// Axes and grid of one panel, with its caption.
fn panel<'a, 'b>(
    area: &'a Area<'b>,
    caption: &str,
    x: Range<f64>,
    y: Range<f64>,
    y_label: &dyn Fn(&f64) -> String,
    with_steps: bool,
) -> Drawn<Chart<'a, 'b>> {
    let caption_style = text(14, FontStyle::Bold, INK, HPos::Left);
    area.draw(&Text::new(caption, (units(MARGIN), units(14)), caption_style))?;
    let mut chart = ChartBuilder::on(area)
        .margin_top(units(30))
        .margin_right(units(MARGIN))
        .margin_left(units(MARGIN))
        .margin_bottom(units(8))
        .y_label_area_size(units(50))
        .x_label_area_size(units(if with_steps { 46 } else { 0 }))
        .build_cartesian_2d(x, y)?;
    let small = text(13, FontStyle::Normal, MUTED, HPos::Left);
    let mut mesh = chart.configure_mesh();
    mesh.bold_line_style(GRID.stroke_width(units(1) as u32))
        .max_light_lines(0)
        .axis_style(AXIS.stroke_width(units(1) as u32))
        .set_all_tick_mark_size(units(4))
        .x_labels(9)
        .y_labels(if area.dim_in_pixel().1 < units(250) as u32 { 4 } else { 7 })
        .label_style(small)
        .y_label_formatter(y_label)
        .x_label_formatter(&thousands);
    if with_steps {
        mesh.x_desc("Step").axis_desc_style(text(14, FontStyle::Normal, INK, HPos::Center));
    }
    mesh.draw()?;
    Ok(chart)
}

/// Draws a curve as far as it lies at or below `top`.
fn line(chart: &mut Chart, points: &[(f64, f64)], top: f64, color: RGBAColor, width: i32) -> Drawn<()> {
    for part in below(points, top) {
        // A point without neighbours is no line.
        if let [point] = part[..] {
            chart.draw_series([Circle::new(point, units(width + 1), color.filled())])?;
        } else {
            chart.draw_series([PathElement::new(part, color.stroke_width(units(width) as u32))])?;
        }
    }
    Ok(())
}

fn units(points: i32) -> i32 {
    points * UNITS
}

/// Text of `size` points, centred on the height of its position.
fn text(size: i32, style: FontStyle, color: RGBColor, h_pos: HPos) -> TextStyle<'static> {
    // The SVG backend divides sizes by this.
    let font = FontDesc::new(FontFamily::Name(FONT), f64::from(units(size)) * 1.24, style);
    TextStyle { font, color: color.to_backend_color(), pos: Pos::new(h_pos, VPos::Center) }
}

/// A number with no more than three decimals.
fn trimmed(value: &f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A learning rate, such as `2.5e-4`.
fn scientific(value: &f64) -> String {
    if *value == 0.0 {
        return "0".into();
    }
    let text = format!("{value:.2e}");
    match text.split_once('e') {
        Some((mantissa, exponent)) if mantissa.contains('.') => {
            format!("{}e{exponent}", mantissa.trim_end_matches('0').trim_end_matches('.'))
        }
        _ => text,
    }
}

/// A step, such as `12,000`; nothing between two steps.
fn thousands(step: &f64) -> String {
    if step.fract() != 0.0 {
        return String::new();
    }
    let digits = format!("{step:.0}");
    let groups: Vec<&str> = digits.as_bytes().rchunks(3).rev().filter_map(|group| str::from_utf8(group).ok()).collect();
    groups.join(",")
}

/// The PNG of `svg`.
fn rasterize(svg: &str) -> Result<Vec<u8>, String> {
    let mut options = usvg::Options::default();
    for font in [INTER, INTER_SEMIBOLD] {
        options.fontdb_mut().load_font_data(font.to_vec());
    }
    let tree = usvg::Tree::from_str(svg, &options).map_err(|error| error.to_string())?;
    let scale = PIXELS / UNITS as f32;
    let size = tree.size().to_int_size().scale_by(scale).ok_or("the picture has no pixels")?;
    let mut pixels = tiny_skia::Pixmap::new(size.width(), size.height()).ok_or("the picture is too large")?;
    resvg::render(&tree, tiny_skia::Transform::from_scale(scale, scale), &mut pixels.as_mut());
    pixels.encode_png().map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::metrics::{TrainRow, ValRow};

    pub(super) fn train_row(step: u64, bits_per_byte: f64, lr: f64) -> Row {
        Row::Train(TrainRow {
            step,
            loss: bits_per_byte * std::f64::consts::LN_2,
            bits_per_byte,
            lr,
            grad_norm: 1.0,
            seq_len: 512,
            bytes_seen: 0,
            bytes_per_second: 0.0,
            skipped_steps: 0,
            loss_scale: None,
            mfu: None,
            data_wait: 0.0,
            peak_memory_bytes: 0,
            byte_classes: None,
        })
    }

    fn val_row(step: u64, val_bits_per_byte: f64) -> Row {
        Row::Val(ValRow { step, val_loss: val_bits_per_byte * std::f64::consts::LN_2, val_bits_per_byte, bytes: 1 })
    }

    /// A run whose bits per byte fall from 8 towards `end`.
    fn run(name: &str, steps: u64, end: f64) -> Run {
        let mut noise = 1_u64;
        let rows = (0..steps).step_by(10).flat_map(|step| {
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let done = step as f64 / steps as f64;
            let bits = end + (8.0 - end) * (-12.0 * done).exp() + 0.6 * (1.0 - done);
            let noisy = bits + 0.35 * ((noise >> 33) as f64 / (1_u64 << 31) as f64 - 0.5);
            let lr = 1e-3 * (done * 10.0).min(1.0) * (0.55 + 0.45 * (done * std::f64::consts::PI).cos());
            let val = (step % 250 == 240).then(|| val_row(step, bits + 0.05));
            [Some(train_row(step, noisy, lr)), val].into_iter().flatten()
        });
        Run { name: name.into(), rows: rows.collect() }
    }

    /// The pixels of what `plot` draws into a file.
    pub(super) fn pixels_of(plot: impl FnOnce(&Path) -> Result<(), PlotError>) -> tiny_skia::Pixmap {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("plot.png");
        plot(&out).unwrap();
        tiny_skia::Pixmap::load_png(&out).unwrap()
    }

    /// Plots `runs` and gives the pixels.
    fn picture(runs: &[Run]) -> tiny_skia::Pixmap {
        pixels_of(|out| plot(runs, out))
    }

    /// How many pixels have exactly this colour.
    pub(super) fn count(pixels: &tiny_skia::Pixmap, RGBColor(r, g, b): RGBColor) -> usize {
        pixels.pixels().iter().filter(|pixel| (pixel.red(), pixel.green(), pixel.blue()) == (r, g, b)).count()
    }

    #[test]
    fn every_run_is_drawn_in_its_colour_with_text() {
        let pixels = picture(&[run("tiny", 4000, 2.0), run("tiny-binary", 4000, 2.3), run("small-fp", 3000, 1.8)]);
        assert_eq!((pixels.width(), pixels.height()), (2000, 1280));
        for color in &COLORS[..3] {
            assert!(count(&pixels, *color) > 1000, "{color:?}");
        }
        assert_eq!(count(&pixels, COLORS[3]), 0);
        // Text is there though the machine's own fonts were never looked at.
        assert!(count(&pixels, INK) > 300);
    }

    #[test]
    fn many_runs_with_long_names_and_strange_characters() {
        let many: Vec<Run> = (0..9)
            .map(|i| run(&format!("<a & \"b\"> {i}\u{1} {}", "long ".repeat(4 + 2 * i)), 2000, 2.0 + 0.1 * i as f64))
            .collect();
        // The ninth run has the colour of the first again.
        let pixels = picture(&many);
        assert!(COLORS.iter().all(|color| count(&pixels, *color) > 100));
    }

    #[test]
    fn the_legend_makes_its_own_room() {
        let many: Vec<Run> = (0..60).map(|i| run(&format!("{i} {}", "W".repeat(60)), 100, 2.0)).collect();
        assert!(picture(&many).height() > 2000);
    }

    #[test]
    fn a_single_point_shows() {
        let pixels = picture(&[Run { name: "just begun".into(), rows: vec![train_row(0, 8.0, 1e-4)] }]);
        assert!(count(&pixels, COLORS[0]) > 50);
    }

    #[test]
    fn validations_alone_show() {
        let rows = vec![val_row(100, 3.0), val_row(200, 2.5)];
        assert!(count(&picture(&[Run { name: "validations".into(), rows }]), COLORS[0]) > 50);
    }

    #[test]
    fn gaps_are_left_out() {
        let mut broken = run("gap", 2000, 2.0);
        for row in &mut broken.rows[80..120] {
            if let Row::Train(row) = row {
                row.bits_per_byte = f64::NAN;
            }
        }
        assert!(count(&picture(&[broken]), COLORS[0]) > 1000);
        let nan = f64::NAN;
        assert_eq!(below(&[(0.0, 1.0), (1.0, nan), (2.0, 1.0)], 9.0), [[(0.0, 1.0)], [(2.0, 1.0)]]);
        let smoothed = smooth(&[(0.0, 1.0), (1.0, nan), (2.0, 3.0)]);
        assert!(smoothed[0].1 == 1.0 && smoothed[1].1.is_nan() && smoothed[2].1 == 3.0);
    }

    #[test]
    fn curves_are_cut_where_they_leave_the_picture() {
        let curve = [(0.0, 4.0), (1.0, 2.0), (2.0, 1.0), (3.0, 5.0), (4.0, 3.0)];
        let expected = vec![vec![(0.5, 3.0), (1.0, 2.0), (2.0, 1.0), (2.5, 3.0)], vec![(4.0, 3.0), (4.0, 3.0)]];
        assert_eq!(below(&curve, 3.0), expected);
    }

    #[test]
    fn smoothing_takes_out_noise_and_keeps_the_fall() {
        let fall = |i: f64| 2.0 + 6.0 * (-i / 5.0).exp() + 0.5 * (-i / 200.0).exp();
        let noise = |i: u32| if i.is_multiple_of(2) { 0.2 } else { -0.2 };
        let noisy: Points = (0..400).map(|i| (f64::from(i), fall(f64::from(i)) + noise(i))).collect();
        let smoothed = smooth(&noisy);
        for &(step, value) in &smoothed[40..] {
            assert!((value - fall(step)).abs() < 0.03, "step {step}: {value}");
        }
        for &(step, value) in &smoothed[..40] {
            assert!((value - fall(step)).abs() < 0.25, "step {step}: {value}");
        }
    }

    #[test]
    fn the_steep_beginning_is_cut_and_nothing_else() {
        let falling = (0..1000).map(|i| 2.0 + 6.0 * (-f64::from(i) / 10.0).exp());
        let shown = range(falling);
        assert!(shown.start < 2.0 && shown.end > 2.5 && shown.end < 5.0, "{shown:?}");
        let even = range((0..1000).map(f64::from));
        assert!(even.start < 0.0 && even.end > 999.0, "{even:?}");
        let one = range([8.0].into_iter());
        assert!(one.start < 8.0 && one.end > 8.0, "{one:?}");
    }

    #[test]
    fn labels_read_well() {
        assert_eq!(["0", "1e-3", "2.5e-4"], [0.0, 1e-3, 2.5e-4].map(|lr| scientific(&lr)));
        assert_eq!(["0", "950", "12,000", "1,200,000", ""], [0.0, 950.0, 12e3, 12e5, 0.5].map(|step| thousands(&step)));
        assert_eq!(["2", "2.25", "10"], [2.0, 2.25, 10.0].map(|bits| trimmed(&bits)));
    }

    #[test]
    fn errors_say_what_would_do() {
        let directory = tempfile::tempdir().unwrap();
        let png = directory.path().join("plot.png");
        let message = |runs: &[Run], out: &Path| plot(runs, out).unwrap_err().to_string();
        assert!(message(&[run("a", 100, 2.0)], Path::new("plot.svg")).contains("plot.svg: only PNG"));
        assert!(message(&[], &png).contains("metrics.jsonl"));
        let nan = Run { name: "broken".into(), rows: vec![train_row(1, f64::NAN, 1e-3)] };
        assert!(message(&[nan], &png).contains("run \"broken\""));
        assert!(message(&[Run { name: "empty".into(), rows: vec![] }], &png).contains("run \"empty\""));
        assert!(!png.exists());
        let missing = directory.path().join("absent").join("plot.png");
        assert!(message(&[run("a", 100, 2.0)], &missing).starts_with(&*missing.to_string_lossy()));
    }
}
