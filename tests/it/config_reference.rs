//! docs/configuration.md is what the doc comments of src/config/ say: one row for each key.
//!
//! `UPDATE_DOCS=1 cargo test --test it config_reference` writes the page anew.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use bbt::config::Config;
use syn::{Attribute, Expr, ExprLit, Field, Fields, ItemEnum, ItemStruct, Lit, Meta, Type};

const HEAD: &str = "\
<!-- Written from the doc comments of src/config/ by `UPDATE_DOCS=1 cargo test --test it config_reference`. -->

# Configuration

Every key of a YAML file given with `--config`, with its default. `--set section.key=value` sets any of them on the
command line, and `bbt config` prints them all as they are resolved. Many have a flag of their own: `bbt train --help`.
";

/// What the files of src/config/ define.
struct Definitions {
    structs: BTreeMap<String, ItemStruct>,
    enums: BTreeMap<String, ItemEnum>,
}

impl Definitions {
    fn read(dir: &Path) -> Self {
        let mut found = Self { structs: BTreeMap::new(), enums: BTreeMap::new() };
        for entry in fs::read_dir(dir).expect("src/config/") {
            let text = fs::read_to_string(entry.expect("an entry").path()).expect("a source file");
            for item in syn::parse_file(&text).expect("Rust").items {
                match item {
                    syn::Item::Struct(item) => drop(found.structs.insert(item.ident.to_string(), item)),
                    syn::Item::Enum(item) => drop(found.enums.insert(item.ident.to_string(), item)),
                    _ => {}
                }
            }
        }
        found
    }

    fn fields(&self, name: &str) -> Vec<&Field> {
        let definition = self.structs.get(name).unwrap_or_else(|| panic!("src/config/ defines no struct {name}"));
        match &definition.fields {
            Fields::Named(fields) => fields.named.iter().collect(),
            _ => panic!("{name} has no named fields"),
        }
    }
}

/// The text of an item's doc comment, as one paragraph.
fn doc(attributes: &[Attribute]) -> String {
    let lines = attributes.iter().filter_map(|attribute| match &attribute.meta {
        Meta::NameValue(pair) if pair.path.is_ident("doc") => match &pair.value {
            Expr::Lit(ExprLit { lit: Lit::Str(text), .. }) => Some(text.value().trim().to_string()),
            _ => None,
        },
        _ => None,
    });
    lines.collect::<Vec<_>>().join(" ").trim().to_string()
}

/// The value of `serde(NAME = "…")` among the attributes.
fn serde_text(attributes: &[Attribute], name: &str) -> Option<String> {
    let mut found = None;
    for attribute in attributes.iter().filter(|attribute| attribute.path().is_ident("serde")) {
        let parsed = attribute.parse_nested_meta(|meta| {
            if let Ok(value) = meta.value() {
                let text: syn::LitStr = value.parse()?;
                if meta.path.is_ident(name) {
                    found = Some(text.value());
                }
            }
            Ok(())
        });
        parsed.expect("serde's attributes");
    }
    found
}

/// The last part of a type's path, and that of its argument: `Option<u64>` is ("Option", Some("u64")).
fn type_names(of: &Type) -> (String, Option<String>) {
    let Type::Path(path) = of else { return ("tuple".into(), None) };
    let last = path.path.segments.last().expect("a path has parts");
    let argument = match &last.arguments {
        syn::PathArguments::AngleBracketed(arguments) => arguments.args.first().and_then(|argument| match argument {
            syn::GenericArgument::Type(inner) => Some(type_names(inner).0),
            _ => None,
        }),
        _ => None,
    };
    (last.ident.to_string(), argument)
}

/// As serde spells a variant.
fn variant_name(of: &ItemEnum, variant: &syn::Variant) -> String {
    if let Some(name) = serde_text(&variant.attrs, "rename") {
        return name;
    }
    let name = variant.ident.to_string();
    match serde_text(&of.attrs, "rename_all").as_deref() {
        Some("lowercase") => name.to_lowercase(),
        Some("snake_case") => {
            let mut snake = String::new();
            for (index, c) in name.char_indices() {
                if c.is_uppercase() && index > 0 {
                    snake.push('_');
                }
                snake.extend(c.to_lowercase());
            }
            snake
        }
        other => panic!("{}: rename_all = {other:?} is unknown here", of.ident),
    }
}

fn page() -> String {
    let definitions = Definitions::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/config"));
    let defaults: serde_json::Value = serde_json::to_value(Config::default()).expect("JSON");
    let mut page = HEAD.to_string();
    for section in definitions.fields("Config") {
        let key = section.ident.as_ref().expect("a name").to_string();
        let (of, _) = type_names(&section.ty);
        write!(page, "\n## {key}\n\n{}\n\n| key | default | what |\n|---|---|---|\n", doc(&section.attrs))
            .expect("text");
        for field in definitions.fields(&of) {
            let name = field.ident.as_ref().expect("a name").to_string();
            let default = &defaults[&key][&name];
            assert!(
                !default.is_null() || type_names(&field.ty).0 == "Option",
                "{key}.{name} is not in Config::default()"
            );
            let (outer, inner) = type_names(&field.ty);
            let mut what = doc(&field.attrs);
            assert!(!what.is_empty(), "{key}.{name} has no doc comment");
            let kind = if outer == "Option" { inner.unwrap_or_default() } else { outer };
            if let Some(choices) = definitions.enums.get(&kind).filter(|e| serde_text(&e.attrs, "rename_all").is_some())
            {
                for variant in &choices.variants {
                    write!(what, "<br>`{}`: {}", variant_name(choices, variant), doc(&variant.attrs)).expect("text");
                }
            }
            let default = default.to_string().replace('"', "").replace(',', ", ");
            writeln!(page, "| `{name}` | `{default}` | {} |", what.replace('|', "\\|")).expect("text");
        }
    }
    page
}

#[test]
fn the_page_of_every_key_is_what_the_doc_comments_say() {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
    let page = page();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, &page).expect("docs/ can be written");
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(found == page, "docs/configuration.md is not today's: UPDATE_DOCS=1 cargo test --test it config_reference");
}
