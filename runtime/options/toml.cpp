#include "toml.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>

#include "../base/errors.h"

namespace {

void append_utf8(std::string& out, uint32_t code) {
    if (code < 0x80) {
        out += char(code);
    } else if (code < 0x800) {
        out += char(0xC0 | code >> 6);
        out += char(0x80 | (code & 0x3F));
    } else if (code < 0x10000) {
        out += char(0xE0 | code >> 12);
        out += char(0x80 | (code >> 6 & 0x3F));
        out += char(0x80 | (code & 0x3F));
    } else {
        out += char(0xF0 | code >> 18);
        out += char(0x80 | (code >> 12 & 0x3F));
        out += char(0x80 | (code >> 6 & 0x3F));
        out += char(0x80 | (code & 0x3F));
    }
}

bool is_key_char(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '_';
}

class Reader {
public:
    Reader(const std::string& text, const std::string& name) : text_(text), name_(name) {}

    std::vector<TomlItem> items() {
        std::vector<TomlItem> items;
        for (skip_lines(); !at_end(); skip_lines()) {
            TomlItem item;
            item.line = line_;
            item.key = key();
            if (std::any_of(items.begin(), items.end(), [&](const TomlItem& i) { return i.key == item.key; }))
                fail("'" + item.key + "' comes twice");
            skip_blanks();
            if (peek() != '=') fail("'" + item.key + "' has no '='; options are lines such as batch = 4");
            at_++;
            skip_blanks();
            if (peek() == '[')
                array(item);
            else
                value(item);
            skip_comment();
            if (!at_end() && peek() != '\n') fail("more after the value of '" + item.key + "'");
            items.push_back(std::move(item));
        }
        return items;
    }

private:
    const std::string &text_, &name_;
    size_t at_ = 0;
    int line_ = 1;

    [[noreturn]] void fail(const std::string& what) const {
        throw BadInput(name_ + ":" + std::to_string(line_) + ": " + what);
    }
    bool at_end() const { return at_ >= text_.size(); }
    char peek(size_t ahead = 0) const { return at_ + ahead < text_.size() ? text_[at_ + ahead] : '\0'; }

    void skip_blanks() {
        while (peek() == ' ' || peek() == '\t' || (peek() == '\r' && peek(1) == '\n')) at_++;
    }
    void skip_comment() {
        skip_blanks();
        if (peek() == '#')
            while (!at_end() && peek() != '\n') at_++;
    }
    void skip_lines() {
        for (skip_comment(); peek() == '\n'; skip_comment()) at_++, line_++;
    }

    std::string key() {
        if (peek() == '[') fail("sections have no place here; every option is a line such as batch = 4");
        if (peek() == '"' || peek() == '\'') return quoted();
        size_t start = at_;
        while (is_key_char(peek())) at_++;
        if (at_ == start) fail("expected the name of an option");
        return text_.substr(start, at_ - start);
    }

    void value(TomlItem& item) {
        if (peek() == '"' || peek() == '\'') {
            item.string = true;
            item.values.push_back(quoted());
            return;
        }
        std::string word;
        while (is_key_char(peek()) || peek() == '+' || peek() == '.') word += text_[at_++];
        if (word.empty()) fail("'" + item.key + "' has no value");
        // TOML lets an underscore stand between digits: 524_288.
        for (size_t i = 1; i + 1 < word.size(); i++)
            if (word[i] == '_' && isdigit(static_cast<unsigned char>(word[i - 1])) &&
                isdigit(static_cast<unsigned char>(word[i + 1])))
                word.erase(i, 1);
        if (word.size() > 1 && word[0] == '+') word.erase(0, 1);
        item.values.push_back(word);
    }

    void array(TomlItem& item) {
        item.array = true;
        at_++;
        for (skip_lines(); peek() != ']'; skip_lines()) {
            if (at_end()) fail("the array of '" + item.key + "' is not closed");
            value(item);
            skip_lines();
            if (peek() == ',')
                at_++;
            else if (!at_end() && peek() != ']')
                fail("expected ',' or ']' in the array of '" + item.key + "'");
        }
        at_++;
    }

    std::string quoted() {
        char quote = peek();
        if (peek(1) == quote && peek(2) == quote) fail("strings of several lines have no place here");
        std::string out;
        for (at_++; peek() != quote; at_++) {
            if (at_end() || peek() == '\n') fail("a string is not closed");
            if (quote == '"' && peek() == '\\')
                escape(out);
            else
                out += peek();
        }
        at_++;
        return out;
    }

    // Leaves at_ on the escape's last character.
    void escape(std::string& out) {
        char c = peek(1);
        at_++;
        const char *names = "btnfre\"\\", *bytes = "\b\t\n\f\r\x1b\"\\";
        for (int i = 0; names[i]; i++)
            if (c == names[i]) {
                out += bytes[i];
                return;
            }
        if (c != 'u' && c != 'U') fail(std::string("unknown escape \\") + (c ? c : ' '));
        uint32_t code = 0;
        for (int digits = c == 'u' ? 4 : 8; digits > 0; digits--) {
            at_++;
            char d = peek();
            if (d >= '0' && d <= '9')
                code = code * 16 + uint32_t(d - '0');
            else if ((d | 32) >= 'a' && (d | 32) <= 'f')
                code = code * 16 + uint32_t((d | 32) - 'a' + 10);
            else
                fail("\\u and \\U need 4 and 8 hexadecimal digits");
        }
        if (code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) fail("\\u names no character");
        append_utf8(out, code);
    }
};

} // namespace

std::vector<TomlItem> parse_toml(const std::string& text, const std::string& name) {
    return Reader(text, name).items();
}

std::string toml_string(const std::string& text) {
    std::string out = "\"";
    for (char c : text) {
        if (c == '"' || c == '\\') {
            out += '\\';
            out += c;
        } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) {
            char code[8];
            snprintf(code, sizeof code, "\\u%04X", static_cast<unsigned char>(c));
            out += code;
        } else {
            out += c;
        }
    }
    return out + "\"";
}
