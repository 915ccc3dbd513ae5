"""Which language a file is in, by the end of its name. Languages have GitHub Linguist's names, in lower case."""

from pathlib import PurePosixPath

_SUFFIXES = {
    "assembly": ".asm .s",
    "batchfile": ".bat .cmd",
    "c": ".c .h",
    "c#": ".cs",
    "c++": ".cc .cpp .cxx .c++ .hh .hpp .hxx .h++ .ipp",
    "clojure": ".clj .cljc .cljs",
    "cmake": ".cmake",
    "css": ".css",
    "cuda": ".cu .cuh",
    "cython": ".pyx .pxd .pxi",
    "dart": ".dart",
    "elixir": ".ex .exs",
    "emacs lisp": ".el",
    "erlang": ".erl .hrl",
    "f#": ".fs .fsi .fsx",
    "fortran": ".f .f77 .f90 .f95 .f03 .f08 .for",
    "go": ".go",
    "graphql": ".graphql .gql",
    "groovy": ".groovy .gradle",
    "haskell": ".hs .lhs",
    "hcl": ".hcl .tf",
    "html": ".html .htm .xhtml",
    "java": ".java",
    "javascript": ".js .cjs .mjs .jsx",
    "json": ".json",
    "julia": ".jl",
    "jupyter notebook": ".ipynb",
    "kotlin": ".kt .kts",
    "lean": ".lean",
    "less": ".less",
    "lua": ".lua",
    "makefile": ".mk .mak",
    "markdown": ".md .markdown",
    "matlab": ".m",
    "nix": ".nix",
    "ocaml": ".ml .mli",
    "pascal": ".pas .dpr",
    "perl": ".pl .pm",
    "php": ".php",
    "powershell": ".ps1 .psm1",
    "prolog": ".pro .prolog",
    "protocol buffer": ".proto",
    "python": ".py .pyi .pyw",
    "r": ".r",
    "restructuredtext": ".rst",
    "ruby": ".rb .rake",
    "rust": ".rs",
    "sass": ".sass",
    "scala": ".scala .sbt",
    "scheme": ".scm .ss",
    "scss": ".scss",
    "shell": ".sh .bash .zsh",
    "solidity": ".sol",
    "sql": ".sql",
    "standard ml": ".sml .fun",
    "swift": ".swift",
    "systemverilog": ".sv .svh",
    "tcl": ".tcl",
    "tex": ".tex .sty .cls",
    "text": ".txt",
    "toml": ".toml",
    "typescript": ".ts .mts .cts .tsx",
    "vhdl": ".vhd .vhdl",
    "verilog": ".v .vh",
    "vim script": ".vim",
    "visual basic .net": ".vb",
    "vue": ".vue",
    "xml": ".xml .xsd",
    "xslt": ".xslt .xsl",
    "yaml": ".yaml .yml",
    "zig": ".zig",
}
_NAMES = {"makefile": "makefile", "gnumakefile": "makefile", "cmakelists.txt": "cmake", "dockerfile": "dockerfile"}
_LANGUAGES = {suffix: language for language, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}


NAMES = tuple(_SUFFIXES) + tuple(_NAMES.values())
"""All languages that the name of a file can tell."""


def language_of(name: str) -> str | None:
    """The language of a file; None where its name does not tell."""
    path = PurePosixPath(name.lower())
    return _NAMES.get(path.name) or _LANGUAGES.get(path.suffix)


def suffixes_of(language: str) -> tuple[str, ...]:
    """Ends of the names of a language's files, as they are usually written; none where the language is not known."""
    return tuple(_SUFFIXES.get(language, "").split())
