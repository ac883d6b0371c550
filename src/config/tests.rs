use std::path::Path;

use super::*;

fn layers(text: &str) -> Result<Layers, ConfigError> {
    let mut layers = Layers::default();
    layers.add_yaml(text, Path::new("run.yaml"))?;
    Ok(layers)
}

fn message(text: &str) -> String {
    match layers(text).and_then(|l| l.resolve(None)) {
        Ok(config) => panic!("accepted: {config:?}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn flags_override_yaml_and_yaml_overrides_defaults() {
    let mut l = layers("optim: {lr: 1e-4, weight_decay: 0.2}\ntrain: {steps: 7}\n").unwrap();
    l.set("--lr", "optim.lr", 5e-4).unwrap();
    l.set_text("optim.betas=[0.8, 0.9]").unwrap();
    let config = l.resolve(None).unwrap();
    assert_eq!((config.optim.lr, config.optim.weight_decay), (5e-4, 0.2));
    assert_eq!((config.optim.betas, config.train.steps), ((0.8, 0.9), 7));
    assert_eq!(config.optim.eps, 1e-8);
    assert_eq!(config.data.seq_len, Some(512));
}

/// It calls itself the reference of all keys, and the guide does so, too.
#[test]
fn tiny_yaml_shows_every_key() {
    let keys = |text: &str| -> Vec<String> {
        let sections: yaml::Mapping = yaml::parse(text).unwrap();
        let keys = |(section, keys): (&yaml::Value, &yaml::Value)| {
            let name = |key: &yaml::Value| format!("{}.{}", section.as_str().unwrap(), key.as_str().unwrap());
            keys.as_mapping().unwrap().keys().map(name).collect::<Vec<_>>()
        };
        sections.iter().flat_map(keys).collect()
    };
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/configs/tiny.yaml")).unwrap();
    let mut shown = keys(&text);
    // Which excludes data.seq_len: shown in its comment.
    assert!(text.contains("or curriculum: ["));
    shown.push("data.curriculum".into());
    let mut all = keys(&Config::default().to_yaml());
    shown.sort();
    all.sort();
    assert_eq!(shown, all);
}

#[test]
fn a_resolved_configuration_reads_back_equal() {
    for text in ["", "data: {curriculum: [[0.0, 64], [0.5, 128]]}\ntrain: {device: cuda:3, stop_at: 4}\n"] {
        let config = layers(text).unwrap().resolve(None).unwrap();
        assert_eq!(layers(&config.to_yaml()).unwrap().resolve(None).unwrap(), config);
        assert_eq!(Config::from_yaml(&config.to_yaml()).unwrap(), config);
    }
}

#[test]
fn unknown_and_mistyped_keys_are_named_with_their_line() {
    let text = message("model:\n  n_layer: 2\n  n_layr: 3\n");
    assert!(text.contains("run.yaml") && text.contains("n_layr") && text.contains("line 3"), "{text}");
    let text = message("optim:\n  lr: fast\n");
    assert!(text.contains("optim.lr") && text.contains("line 2"), "{text}");
    let text = message("modle: {}\n");
    assert!(text.contains("modle") && text.contains("line 1"), "{text}");
    let text = message("train: {device: tpu}\n");
    assert!(text.contains("train.device") && text.contains("`tpu`") && text.contains("line 1"), "{text}");
    let mut l = Layers::default();
    let text = l.set_text("optim.lrr=1").unwrap_err().to_string();
    assert!(text.contains("--set optim.lrr=1") && text.contains("unknown field"), "{text}");
}

#[test]
fn a_value_is_read_by_one_rule_wherever_it_stands() {
    // A number or a truth value where a path or a name belongs.
    for (text, key, expected) in [
        ("train: {out: 7}", "train.out=7", "7"),
        ("data:\n  train: 2024\n", "data.train=2024", "2024"),
        ("data: {val: false}", "data.val=false", "false"),
    ] {
        let mut set = Layers::default();
        set.set_text(key).unwrap();
        let [file, flag] = [layers(text).unwrap(), set].map(|layers| layers.resolve(None).unwrap());
        assert_eq!(file, flag, "{text}");
        assert_eq!(layers(&file.to_yaml()).unwrap().resolve(None).unwrap(), file, "{text}");
        let found = [file.train.out.to_str(), Some(file.data.train.as_str()), file.data.val.as_deref()];
        assert!(found.contains(&Some(expected)), "{found:?}");
    }
    for (key, value, part) in [
        ("train.precision", "16", "`fp32`"),
        ("train.precision", "[1]", "one of its names"),
        ("optim.lr", "fast", "a number"),
        ("optim.lr", "[1]", "a number"),
        ("optim.betas", "0.9", "two values"),
        ("optim.betas", "[0.9]", "two values"),
        ("train.steps", "-1", "not below 0"),
        ("train.steps", "1.5", "not below 0"),
        ("train.checkpointing", "maybe", "a boolean"),
        ("model.n_layer", "two", "a whole number"),
        ("train.device", "3", "unknown device `3`"),
        ("model", "1", "section.key"),
    ] {
        let mut l = Layers::default();
        let flag = l.set_text(&format!("{key}={value}")).unwrap_err().to_string();
        assert!(flag.starts_with(&format!("--set {key}={value}: ")) && flag.contains(part), "{flag}");
        assert!(!flag.contains(" line "), "a flag has no lines: {flag}");
        let mut messages = vec![flag];
        if let Some((section, name)) = key.split_once('.') {
            let file = message(&format!("# a comment\n{section}:\n  {name}: {value}\n"));
            let named = ["run.yaml", key, "line 3", part].into_iter().all(|part| file.contains(part));
            assert!(named, "{file}");
            messages.push(file);
        }
        for text in messages {
            for rust in ["struct", "enum", "Tagged", "i64", "u64", "f64", "tuple", "unit value"] {
                assert!(!text.contains(rust), "{rust} in {text}");
            }
        }
    }
    for (text, part) in
        [("- 1\n", "sections of keys"), ("model: 3\n", "keys with values"), ("hello\n", "sections of keys")]
    {
        let text = message(text);
        assert!(text.contains("run.yaml") && text.contains(part) && !text.contains("struct"), "{text}");
    }
}

#[test]
fn an_empty_section_has_its_defaults() {
    assert_eq!(layers("model:\n").unwrap().resolve(None).unwrap(), layers("").unwrap().resolve(None).unwrap());
}

#[test]
fn a_value_out_of_range_says_where_it_was_given() {
    for (text, origin) in [
        ("train: {steps: 0}\n", "run.yaml line 1"),
        ("model:\n  n_layer: 2\ntrain:\n  # steps: 3\n  'steps': 0   # none\n", "run.yaml line 5"),
        ("optim: {lr: 1}\ntrain: {log_every: 2, steps: 0}\n", "run.yaml line 2"),
    ] {
        assert_eq!(message(text), format!("train.steps: 0 is less than 1 ({origin})"));
    }
    let mut l = layers("train: {steps: 5}").unwrap();
    l.set("--steps", "train.steps", 0).unwrap();
    assert_eq!(l.resolve(None).unwrap_err().to_string(), "train.steps: 0 is less than 1 (--steps)");
}

#[test]
fn values_out_of_range_name_their_key() {
    for (text, key) in [
        ("model: {n_layer: 0}", "model.n_layer"),
        ("model: {d_model: 64, n_head: 5}", "model.n_head"),
        ("model: {d_model: 12, n_head: 4}", "model.n_head"),
        ("model: {n_head: 12, n_kv_head: 5}", "model.n_kv_head"),
        ("optim: {lr: -1}", "optim.lr"),
        ("optim: {lr: .nan}", "optim.lr"),
        ("optim: {betas: [0.9, 1.0]}", "optim.betas"),
        ("optim: {warmup_frac: 1.5}", "optim.warmup_frac"),
        ("optim: {schedule: wsd, decay_frac: 1.1}", "optim.decay_frac"),
        ("optim: {schedule: wsd, decay_frac: 0.9, warmup_frac: 0.2}", "optim.decay_frac"),
        ("optim: {schedule: wsd, warmup_steps: 9}\ntrain: {steps: 10}", "optim.decay_frac"),
        ("optim: {schedule: two_stage, stage_frac: -0.1}", "optim.stage_frac"),
        ("optim: {schedule: two_stage, stage_lr_factor: .nan}", "optim.stage_lr_factor"),
        ("optim: {schedule: two_stage, stage_lr_factor: 0.05}", "optim.stage_lr_factor"),
        ("quant: {start_frac: 1.0}", "quant.start_frac"),
        ("quant: {start_frac: -0.5}", "quant.start_frac"),
        ("train: {steps: 0}", "train.steps"),
        ("train: {batch_size: 0}", "train.batch_size"),
        ("train: {keep: 0}", "train.keep"),
        ("train: {peak_tflops: 0}", "train.peak_tflops"),
        ("data: {seq_len: 0}", "data.seq_len"),
        ("data: {curriculum: [[0.1, 64]]}", "data.curriculum"),
        ("data: {curriculum: [[0.0, 64], [0.0, 32]]}", "data.curriculum"),
    ] {
        let text = message(text);
        assert!(text.starts_with(&format!("{key}: ")), "{text}");
    }
}

#[test]
fn the_later_of_seq_len_and_curriculum_counts() {
    let mut l = layers("data: {curriculum: [[0.0, 64], [0.5, 128]]}").unwrap();
    assert_eq!(l.resolve(None).unwrap().data.max_seq_len(), 128);
    l.set("--seq_len", "data.seq_len", 32).unwrap();
    assert_eq!(l.resolve(None).unwrap().data.curriculum(), [(0.0, 32)]);
    assert!(message("data: {seq_len: 1, curriculum: [[0.0, 2]]}").contains("exclude"));
}

#[test]
fn a_cap_applies_to_whatever_says_the_length() {
    let capped = |mut l: Layers| {
        l.cap_seq_len("--seq_len_cap", 3000).unwrap();
        l.resolve(None).unwrap().data.curriculum()
    };
    assert_eq!(capped(Layers::default()), [(0.0, 2048), (0.2, 3000), (0.5, 3000)]);
    assert_eq!(capped(layers("data: {seq_len: 4096}").unwrap()), [(0.0, 3000)]);
    assert_eq!(capped(layers("data: {curriculum: [[0.0, 8000]]}").unwrap()), [(0.0, 3000)]);
}

#[test]
fn a_checkpoint_gives_the_shape_and_a_contradiction_names_the_key() {
    let model = ModelConfig { n_layer: 2, d_model: 64, n_head: 4, d_ff: 160, ..ModelConfig::default() };
    let quant = QuantConfig { act: ActQuant::None, ..QuantConfig::default() };
    let config = layers("model: {n_layer: 2}").unwrap().resolve(Some((&model, &quant))).unwrap();
    assert_eq!((config.model, config.quant), (model.clone(), quant));
    let error = layers("model: {d_ff: 128}").unwrap().resolve(Some((&model, &quant))).unwrap_err().to_string();
    assert!(error.starts_with("model.d_ff: 128") && error.contains("160"), "{error}");
}

#[test]
fn quantization_comes_in_in_a_line() {
    let quant = |start_frac| QuantConfig { start_frac, ..QuantConfig::default() };
    assert!((0..10).all(|step| quant(0.0).lambda(step, 10) == 1.0));
    let line: Vec<f64> = (0..=10).map(|step| quant(0.4).lambda(step, 10)).collect();
    assert_eq!(line, [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]);
    // However late: a finished run is quantized.
    assert_eq!(quant(0.999).lambda(10, 10), 1.0);
}

#[test]
fn the_parameter_count_is_the_originals() {
    // 256·d + L(4d² + 3·d·f + 2d) + d for the 24-layer default.
    let d = 1536;
    assert_eq!(ModelConfig::default().parameters(), 256 * d + 24 * (4 * d * d + 3 * d * 4096 + 2 * d) + d);
}
