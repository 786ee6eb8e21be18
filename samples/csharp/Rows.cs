// The adapters of a batch's rows as inputs of the graph, as docs/contract.md says.
using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;

/// <summary>What is known of an input by the end of its name.</summary>
public sealed class Kind
{
    public string Suffix, Companion = "";
    public int Axis = -1; // where adapters differ in size, so that rows are filled up
    public bool IsStored; // its default is the base's own tensor, which lies where the manifest says

    public static readonly Kind[] All =
    {
        new Kind { Suffix = ".lora_A.weight", Companion = ".lora_B.weight", Axis = 2 },
        new Kind { Suffix = ".lora_B.weight", Companion = ".lora_A.weight", Axis = 1 },
        new Kind { Suffix = ".lora_magnitude" },
        new Kind { Suffix = ".token_ids", Companion = ".token_delta", Axis = 1 },
        new Kind { Suffix = ".token_delta", Companion = ".token_ids", Axis = 1 },
        new Kind { Suffix = ".weight", Axis = 2, IsStored = true },
        new Kind { Suffix = ".bias", Axis = 2, IsStored = true },
        new Kind { Suffix = "lora_gate" },
    };

    public static Kind Of(string name) { return All.FirstOrDefault(kind => name.EndsWith(kind.Suffix, StringComparison.Ordinal)); }
}

/// <summary>An input as the graph declares it; -1 for a size that varies.</summary>
public sealed class Declared
{
    public int Type;
    public long[] Dims;
}

public static class Rows
{
    /// <summary>Refuse what ONNX Runtime would run wrongly or trip over: missing tensors are silently the base's.</summary>
    public static void RequireFit(Dictionary<string, AdapterTensor> adapter, Dictionary<string, Declared> inputs, string file)
    {
        foreach (var each in adapter)
        {
            Declared declared;
            if (!inputs.TryGetValue(each.Key, out declared) || Kind.Of(each.Key) == null)
                throw new RefusedException("The adapter was made for another graph, which has no such input", file, each.Key);
            var dims = each.Value.Dims;
            bool fits = each.Value.Type == declared.Type && dims.Length == declared.Dims.Length && dims[0] == 1;
            for (int i = 1; fits && i < dims.Length; i++) fits = declared.Dims[i] < 0 || declared.Dims[i] == dims[i];
            if (!fits) throw new RefusedException("The adapter was made for another graph: dtype or dims differ", file, each.Key);
        }
        foreach (var name in adapter.Keys)
        {
            var kind = Kind.Of(name);
            var other = name.Substring(0, name.Length - kind.Suffix.Length) + kind.Companion;
            if (kind.Companion != "" && !adapter.ContainsKey(other))
                throw new RefusedException("The adapter lacks a tensor beside " + name, file, other);
        }
    }

    /// <summary>One input [rows, …] of each row's tensor; a row without one has rank 0, no tokens, or a gain of ones.</summary>
    public static AdapterTensor Stacked(string name, Declared declared, IReadOnlyList<Dictionary<string, AdapterTensor>> rows)
    {
        var kind = Kind.Of(name);
        var values = rows.Select(row => row.ContainsKey(name) ? row[name] : Default(name, kind, declared)).ToList();
        var dims = (long[])values[0].Dims.Clone();
        dims[0] = values.Count;
        if (kind.Axis >= 0) dims[kind.Axis] = values.Max(value => value.Dims[kind.Axis]);
        var fill = Filler(kind, declared.Type);
        var data = new MemoryStream();
        foreach (var value in values)
        {
            if (kind.Axis < 0)
            {
                data.Write(value.Data, 0, value.Data.Length);
                continue;
            }
            long outer = AdapterTensor.Product(dims.Skip(1).Take(kind.Axis - 1));
            int own = (int)AdapterTensor.Product(value.Dims.Skip(kind.Axis)) * fill.Length;
            int all = (int)AdapterTensor.Product(dims.Skip(kind.Axis)) * fill.Length;
            for (int i = 0; i < outer; i++)
            {
                data.Write(value.Data, i * own, own);
                for (int n = own; n < all; n += fill.Length) data.Write(fill, 0, fill.Length);
            }
        }
        return new AdapterTensor { Type = declared.Type, Dims = dims, Data = data.ToArray() };
    }

    static AdapterTensor Default(string name, Kind kind, Declared declared)
    {
        if (kind.IsStored)
            throw new RefusedException("A row brings no such tensor; its default lies where lora_export.json says", "model.onnx.data", name);
        var dims = (long[])declared.Dims.Clone();
        dims[0] = 1;
        if (kind.Axis >= 0)
        {
            dims[kind.Axis] = 0;
            return new AdapterTensor { Type = declared.Type, Dims = dims, Data = new byte[0] };
        }
        dims[1] = 1;
        var one = declared.Type == 1 ? BitConverter.GetBytes(1f) : new byte[] { 0, 0x3c };
        var ones = Enumerable.Range(0, (int)dims[2]).SelectMany(_ => one).ToArray();
        return new AdapterTensor { Type = declared.Type, Dims = dims, Data = ones };
    }

    // What fills up a row: of a head's bias the lowest number, so that a padded class never wins.
    static byte[] Filler(Kind kind, int type)
    {
        if (kind.Suffix == ".token_ids") return BitConverter.GetBytes(-1L);
        if (kind.Suffix == ".bias") return type == 1 ? BitConverter.GetBytes(float.MinValue) : new byte[] { 0xff, 0xfb };
        return new byte[AdapterTensor.BytesOf(type)];
    }
}
